"""Small matchers, maps, labels and embeddings that test files share. Whatever is random has a seed of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qaconv_triton import QAConv

C, H, W = 5, 2, 3
S = H * W
N, K = 8, 3  # classes, and nearest classes of each
LABELS = [3, 0, 3, 7, 1]
CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU


def make_matcher(
    dtype: torch.dtype = torch.float32, mode: str = "train", device: torch.device = DEVICE, **options: Any
) -> QAConv:
    """A matcher without a parameter or statistic that is still at its initial value."""
    torch.manual_seed(0)
    matcher = QAConv(C, H, W, **options).to(device, dtype)
    with torch.no_grad():
        for parameter in (*matcher.bn.parameters(), *matcher.fc.parameters(), *matcher.logit_bn.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
        for norm, mean, variance in ((matcher.bn, 0.4, 0.3), (matcher.logit_bn, 1.1, 0.6)):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.fill_(mean)
            norm.running_var.fill_(variance)
    return set_mode(matcher, mode)


def make_class_matcher(
    dtype: torch.dtype = torch.float32, mode: str = "train", device: torch.device = DEVICE, **options: Any
) -> QAConv:
    """The same with a class table of N classes, and K neighbours unless `options` say otherwise."""
    return make_matcher(dtype, mode, device, **{"num_classes": N, "k_nearest": K, **options})


def set_mode(matcher: QAConv, mode: str) -> QAConv:
    """Set "train", "eval", or train with one norm that uses its running statistics: "frozen bn", "frozen logit_bn"."""
    matcher.train(mode != "eval")
    if mode == "frozen bn":
        matcher.bn.eval()
    if mode == "frozen logit_bn":
        matcher.logit_bn.eval()
    return matcher


def ids(values: list[Any], device: torch.device = DEVICE) -> Tensor:
    """An int64 tensor of labels or indices."""
    return torch.tensor(values, device=device)


def maps(
    count: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (C, H, W),
    device: torch.device = DEVICE,
) -> Tensor:
    """Feature maps `[count, *shape]`, the same rounded to any dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(device, dtype)


def visibility(count: int, seed: int, dtype: torch.dtype = torch.float32, device: torch.device = DEVICE) -> Tensor:
    """Visibility maps `[count, 1, H, W]` in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, H, W, generator=generator, dtype=torch.float64).to(device, dtype)


def embeddings(count: int, dim: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Embeddings `[count, dim]` of very different lengths, so that a dot product is no cosine."""
    lengths = 10 ** (2 * torch.rand(count, 1) - 1)
    return (torch.randn(count, dim) * lengths).to(device, dtype)


def gradient_of(leaf: Tensor) -> Tensor:
    """The gradient of a tensor that must have one."""
    assert leaf.grad is not None
    return leaf.grad


@contextmanager
def torch_default(value: torch.dtype | str) -> Iterator[None]:
    """Change torch's default dtype, or its default device, meanwhile."""
    if isinstance(value, str):
        with torch.device(value):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(value)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
