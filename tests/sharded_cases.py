"""What the tests of a sharded class table share: a matcher on a mesh, the same whole, batches of every rank, checks.

Each check runs on meshes of one to four of the ranks; all of them in one start of the processes.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from qaconv_triton import QAConv

DOCS = Path(__file__).parents[1] / "docs" / "many-devices.md"
N, K, C, H, W = 9, 4, 6, 2, 2  # on four ranks 3, 3, 3 and none
RANKS, SIZES_OF_MESHES = 4, (1, 2, 3, 4)
SIZES = {0: (3, 1, 2, 2), 1: (0, 2, 1, 4), 2: (2, 2, 2, 2)}  # of the ranks' batches, by step modulo 3


def table_values(seed: int = 0) -> Tensor:
    return torch.randn(N, C, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_matcher(mesh: DeviceMesh | None, dtype: torch.dtype, **options: Any) -> QAConv:
    """The same matcher, sharded over a mesh or whole."""
    matcher = QAConv(C, H, W, N, K, mesh=mesh, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(1)
    state = matcher.state_dict()
    state["class_embed"] = table_values().to(dtype)
    state["fc.weight"] = 0.5 + torch.rand(state["fc.weight"].shape, generator=generator).to(dtype)
    state["fc.bias"] = torch.full((1,), 0.3, dtype=dtype)
    for name, value in (("bn.weight", 1.3), ("bn.bias", -0.2), ("logit_bn.weight", 0.8), ("logit_bn.bias", 0.1)):
        state[name] = torch.full((1,), value, dtype=dtype)
    matcher.load_state_dict(state)
    return matcher


def batch(step: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels and visibility of a rank's batch."""
    size = SIZES[step % 3][rank]
    generator = torch.Generator().manual_seed(100 * step + rank)
    features = torch.randn(size, C, H, W, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(N, (size,), generator=generator)
    visibility = torch.rand(size, 1, H, W, generator=generator, dtype=torch.float64).to(dtype)
    return features.requires_grad_(), labels, visibility


def loss_of(values: Tensor) -> Tensor:
    """A loss of a rank's scores that an empty batch has as well."""
    weights = torch.linspace(-1.0, 1.0, values.shape[1], dtype=values.dtype) if values.shape[1] else values.new_empty(0)
    return ((values * weights).sum(1).sin() + values.square().mean(1)).sum()


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is, or a `DTensor` gathered from all ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def gradients(matcher: nn.Module) -> dict[str, Tensor]:
    return {name: whole(each.grad) for name, each in matcher.named_parameters() if each.grad is not None}


def docs_code(*, with_lightning: bool = False) -> dict[str, Any]:
    """What the Python blocks of docs/many-devices.md define; without Lightning, which imports slowly, the rest."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL):
        if with_lightning or "lightning" not in block:
            exec(block, names)
    return names


def errors_of(checks: Sequence[Callable[..., None]], *given: Any) -> dict[str, str]:
    """The traceback of every check that fails for what is given, and nothing for those that pass, by name."""
    found = {}
    for check in checks:
        try:
            check(*given)
            found[check.__name__] = ""
        except Exception:
            found[check.__name__] = traceback.format_exc()
    return found


Check = Callable[[DeviceMesh], Any]
Found = dict[tuple[int, str], Any]  # by size of the mesh and name of the check: the error's text, or what it returns


@dataclass
class OnMeshes:
    """Runs checks on this rank, for `on_ranks`."""

    checks: Sequence[Check]

    def __call__(self, rank: int) -> Found:
        found: Found = {}
        for mesh in [DeviceMesh("cpu", list(range(RANKS - size, RANKS))) for size in SIZES_OF_MESHES]:
            if mesh.get_coordinate() is None:
                continue
            for check in self.checks:
                try:
                    found[mesh.size(), check.__name__] = check(mesh)
                except Exception:
                    found[mesh.size(), check.__name__] = traceback.format_exc()
        return found


def assert_no_error(found: list[Found], name: str, size: int) -> None:
    for rank, of_rank in enumerate(found[RANKS - size :]):
        result = of_rank[size, name]
        assert not isinstance(result, str), f"rank {rank} of {size}: {result}"
