"""An eager fp64 model of QAConv, and the assertion that a matcher scores and trains as it does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import DEVICE, LABELS, ids, maps, visibility
from tolerances import assert_all_close, assert_close
from torch import Tensor, nn
from torch.nn import functional as F

from qaconv_triton import QAConv


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
        nearest = []
        for own, row in enumerate(similarity.tolist()):
            others = [other for other in range(len(row)) if other != own]
            nearest.append(sorted(others, key=lambda other, row=row: (-row[other], other))[: self.k_nearest])
        return torch.tensor(nearest, device=DEVICE)

    def pooled(self, probe: Tensor, gallery: Tensor, prob_occ: Tensor | None, gal_occ: Tensor | None) -> Tensor:
        probe, gallery = (F.normalize(features, dim=1).flatten(2) for features in (probe, gallery))
        corr = torch.einsum("pcs,gcr->pgrs", probe, gallery)
        if prob_occ is not None:
            corr = corr * prob_occ.flatten(1)[:, None, None, :]
        if gal_occ is not None:
            corr = corr * gal_occ.flatten(1)[None, :, :, None]
        return torch.cat([corr.max(dim=2).values, corr.max(dim=3).values], dim=-1)

    def score(self, pooled: Tensor) -> Tensor:
        values = self.bn(pooled.reshape(-1, 1)).view(-1, pooled.shape[-1])
        return self.logit_bn(self.fc(values)).view(pooled.shape[:-1])

    def scored_classes(self, labels: Tensor) -> Tensor:
        nearest = self.neighbors()[labels]
        return torch.cat([nearest, labels[:, None]], dim=1) if self.include_self else nearest

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
        classes = self.scored_classes(labels)
        rows = []
        for sample, row in enumerate(classes):
            visible = None if prob_occ is None else prob_occ[sample : sample + 1]
            rows.append(self.pooled(prob_fea[sample : sample + 1], self.class_embed[row], visible, None)[0])
        dense = torch.zeros(len(labels), len(self.class_embed), dtype=torch.float64, device=DEVICE)
        return dense.scatter(1, classes, self.score(torch.stack(rows)))


def leaves(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Copies of the inputs, the floating ones in `dtype` and with gradients."""
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
    eager = Eager(matcher)
    expected_inputs, actual_inputs = leaves(inputs, torch.float64), leaves(inputs, dtype)
    expected = eager(**expected_inputs)
    actual = matcher(**actual_inputs) if call is None else call(actual_inputs)
    assert actual.dtype == dtype
    assert float(expected.detach().std()) > 0.1  # nothing constant would pass
    assert_close(actual, expected, dtype)
    assert_all_close(
        {name: matcher.get_buffer(name) for name, _ in eager.named_buffers()}, dict(eager.named_buffers()), dtype
    )
    assert_all_close(gradients(actual, actual_inputs, matcher), gradients(expected, expected_inputs, eager), dtype)


def class_inputs(dtype: torch.dtype, occluded: bool) -> dict[str, Any]:
    """Arguments of a call that scores classes by label."""
    inputs: dict[str, Any] = {"prob_fea": maps(len(LABELS), 1, dtype), "labels": ids(LABELS)}
    return {**inputs, "prob_occ": visibility(len(LABELS), 2, dtype)} if occluded else inputs


def gallery_inputs(dtype: torch.dtype, occluded: bool) -> dict[str, Any]:
    """Arguments of a call that scores four probes against a gallery of three."""
    inputs: dict[str, Any] = {"prob_fea": maps(4, 1, dtype), "gal_fea": maps(3, 3, dtype)}
    if occluded:
        inputs |= {"prob_occ": visibility(4, 2, dtype), "gal_occ": visibility(3, 4, dtype)}
    return inputs


MODES = ["train", "eval", "frozen bn", "frozen logit_bn"]
with_modes = pytest.mark.parametrize("mode", MODES)
with_occlusion = pytest.mark.parametrize("occluded", [False, True], ids=["visible", "occluded"])
with_own_class = pytest.mark.parametrize("include_self", [False, True], ids=["neighbours", "and itself"])
