"""An eager fp64 model of QAConv, and the inputs that it and the matcher are compared on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qaconv_triton import QAConv

C, H, W, N, K = 5, 2, 3, 8, 3
S = H * W
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
LABELS = [3, 0, 3, 7, 1]
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}  # of a tensor's largest entry
MODES = ["train", "eval", "frozen bn", "frozen logit_bn"]


class Eager(nn.Module):
    """QAConv written out: every correlation at once, fp64, torch's own batch norms."""

    def __init__(self, matcher: QAConv) -> None:
        super().__init__()
        self.bn, self.fc, self.logit_bn = (
            copy.deepcopy(part).double() for part in (matcher.bn, matcher.fc, matcher.logit_bn)
        )
        if matcher.class_embed is not None:
            self.class_embed = nn.Parameter(matcher.class_embed.detach().to(torch.float64).contiguous())
        self.k_nearest, self.include_self = matcher.k_nearest, matcher.include_self

    def neighbors(self) -> Tensor:
        flat = F.normalize(self.class_embed.detach().flatten(1), dim=1)
        similarity = flat @ flat.T
        lists = []
        for own, row in enumerate(similarity.tolist()):
            others = [other for other in range(len(row)) if other != own]
            lists.append(sorted(others, key=lambda other, row=row: (-row[other], other))[: self.k_nearest])
        return torch.tensor(lists, device=DEVICE)

    def pooled(self, probe: Tensor, gallery: Tensor, prob_occ: Tensor | None, gal_occ: Tensor | None) -> Tensor:
        probe, gallery = (F.normalize(maps, dim=1).flatten(2) for maps in (probe, gallery))
        corr = torch.einsum("pcs,gcr->pgrs", probe, gallery)
        if prob_occ is not None:
            corr = corr * prob_occ.flatten(1)[:, None, None, :]
        if gal_occ is not None:
            corr = corr * gal_occ.flatten(1)[None, :, :, None]
        return torch.cat([corr.max(dim=2).values, corr.max(dim=3).values], dim=-1)

    def score(self, pooled: Tensor) -> Tensor:
        values = self.bn(pooled.reshape(-1, 1)).view(-1, pooled.shape[-1])
        return self.logit_bn(self.fc(values)).view(pooled.shape[:-1])

    def class_lists(self, labels: Tensor) -> Tensor:
        lists = self.neighbors()[labels]
        return torch.cat([lists, labels[:, None]], dim=1) if self.include_self else lists

    def forward(
        self,
        prob_fea: Tensor,
        gal_fea: Tensor | str | None = None,
        labels: Tensor | None = None,
        prob_occ: Tensor | None = None,
        gal_occ: Tensor | None = None,
    ) -> Tensor:
        if isinstance(gal_fea, str):
            gal_fea = prob_fea
        if gal_fea is not None:
            return self.score(self.pooled(prob_fea, gal_fea, prob_occ, gal_occ))
        if labels is None:
            return self.score(self.pooled(prob_fea, self.class_embed, prob_occ, None))
        lists = self.class_lists(labels)
        rows = []
        for sample, row in enumerate(lists):
            visible = None if prob_occ is None else prob_occ[sample : sample + 1]
            rows.append(self.pooled(prob_fea[sample : sample + 1], self.class_embed[row], visible, None)[0])
        dense = torch.zeros(len(labels), len(self.class_embed), dtype=torch.float64, device=DEVICE)
        return dense.scatter(1, lists, self.score(torch.stack(rows)))


def build(dtype: torch.dtype = torch.float32, mode: str = "train", **options: Any) -> QAConv:
    """A matcher none of whose parameters and statistics is at its initial value."""
    torch.manual_seed(0)
    matcher = QAConv(C, H, W, **options).to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in (*matcher.bn.parameters(), *matcher.fc.parameters(), *matcher.logit_bn.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
        for norm, mean, variance in ((matcher.bn, 0.4, 0.3), (matcher.logit_bn, 1.1, 0.6)):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.fill_(mean)
            norm.running_var.fill_(variance)
    return set_mode(matcher, mode)


def set_mode(matcher: QAConv, mode: str) -> QAConv:
    matcher.train(mode != "eval")
    if mode == "frozen bn":
        matcher.bn.eval()
    if mode == "frozen logit_bn":
        matcher.logit_bn.eval()
    return matcher


def ids(values: list[int]) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def maps(count: int, seed: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (C, H, W)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def visibility(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, H, W, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "scores", floor: float = 0.1) -> None:
    """Within `tolerance` of the largest expected entry (a gradient that is zero in truth is held to `floor`)."""
    assert actual.shape == expected.shape, name
    scale = max(float(expected.detach().abs().max()), floor) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.detach().double().cpu(),
        expected.detach().double().cpu(),
        rtol=0.0,
        atol=tolerance * scale,
        msg=lambda text: f"{name}: {text}",
    )


def leaves(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Copies of the inputs, the floating ones in `dtype` and asking for gradients."""
    return {
        name: value.detach().to(dtype, copy=True).requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def gradients(scores: Tensor, inputs: dict[str, Any], module: nn.Module) -> dict[str, Tensor | None]:
    """Gradients of a weighted sum of the scores, whose weights are all different."""
    weight = torch.randn(scores.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (scores * weight.to(scores)).sum().backward()
    found = {name: value.grad for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}
    found.update({name: parameter.grad for name, parameter in module.named_parameters()})
    return found


def assert_as_eager(
    matcher: QAConv, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor] | None = None
) -> None:
    """Scores, running statistics and every gradient of `matcher(**inputs)` are those of the eager model."""
    dtype = matcher.fc.weight.dtype
    tolerance = TOLERANCE[dtype]
    eager = Eager(matcher)
    expected_inputs, actual_inputs = leaves(inputs, torch.float64), leaves(inputs, dtype)
    expected = eager(**expected_inputs)
    actual = matcher(**actual_inputs) if call is None else call(actual_inputs)
    assert actual.dtype == dtype
    assert float(expected.detach().std()) > 0.1  # nothing constant would pass
    assert_close(actual, expected, tolerance)
    for name, buffer in eager.named_buffers():
        assert_close(matcher.get_buffer(name), buffer, tolerance, name)
    expected_gradients = gradients(expected, expected_inputs, eager)
    actual_gradients = gradients(actual, actual_inputs, matcher)
    assert actual_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        found = actual_gradients[name]
        if gradient is None:
            assert found is None, name
        else:
            assert found is not None, name
            assert_close(found, gradient, tolerance, f"gradient of {name}")


def class_inputs(dtype: torch.dtype, occluded: bool) -> dict[str, Any]:
    inputs: dict[str, Any] = {"prob_fea": maps(len(LABELS), 1, dtype), "labels": ids(LABELS)}
    return {**inputs, "prob_occ": visibility(len(LABELS), 2, dtype)} if occluded else inputs


def gallery_inputs(dtype: torch.dtype, occluded: bool) -> dict[str, Any]:
    inputs: dict[str, Any] = {"prob_fea": maps(4, 1, dtype), "gal_fea": maps(3, 3, dtype)}
    if occluded:
        inputs |= {"prob_occ": visibility(4, 2, dtype), "gal_occ": visibility(3, 4, dtype)}
    return inputs


with_modes = pytest.mark.parametrize("mode", MODES)
with_occlusion = pytest.mark.parametrize("occluded", [False, True], ids=["visible", "occluded"])
with_own_class = pytest.mark.parametrize("include_self", [False, True], ids=["neighbours", "and itself"])
