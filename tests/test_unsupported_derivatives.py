"""Derivatives that do not exist are refused, never a silent zero: forward mode and double backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from errors import class_matcher, features, labels
from inputs import H, W
from torch import Tensor
from torch.autograd import forward_ad

from qaconv_triton import functional as qf
from qaconv_triton import ops

Function = Callable[[Tensor], Tensor]
OTHER = features(seed=2)
TOPK = (2, None, None, None, None)
MATCHER = class_matcher(mode="eval")
DIFFERENTIABLE: dict[str, Function] = {
    "functional.max_correlation": lambda probe: qf.max_correlation(probe, OTHER),
    "functional.max_correlation, gallery": lambda gallery: qf.max_correlation(OTHER, gallery),
    "ops.max_correlation": lambda probe: ops.max_correlation(probe, OTHER, None, None, False, False)[0],
    "matcher, classes": lambda feature: MATCHER.class_scores(feature, labels()).values,
    "matcher, same": lambda feature: MATCHER(feature, "same"),
}
FUNCTIONS: dict[str, Function] = {
    **DIFFERENTIABLE,
    "functional.topk_cosine": lambda queries: qf.topk_cosine(queries, OTHER, 2)[0],
    "functional.class_neighbors": lambda table: qf.class_neighbors(table, 2, return_similarities=True)[0],
    "ops.pair_sums": lambda probe: ops.pair_sums(probe, OTHER, None, None, False, torch.ones(2 * H * W)),
    "ops.cosine_topk": lambda queries: ops.cosine_topk(queries.flatten(1), OTHER.flatten(1), *TOPK)[0],
    "match": lambda feature: MATCHER.match(feature, OTHER),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_forward_mode_is_refused(function: Function) -> None:
    """Torch drops the tangents of an operation that knows nothing of them: a derivative of zero."""
    with pytest.raises(RuntimeError, match=r"forward.mode"):
        torch.func.jvp(function, (features(),), (features(seed=3),))
    for gradient in (False, True):
        with forward_ad.dual_level(), pytest.raises(RuntimeError):
            function(forward_ad.make_dual(features().requires_grad_(gradient), features(seed=3)))


def test_forward_mode_of_many_tangents_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"forward.mode"):
        torch.func.jacfwd(FUNCTIONS["functional.max_correlation"])(features())


@pytest.mark.parametrize("function", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE.keys())
def test_double_backward_is_refused(function: Function) -> None:
    feature = features().requires_grad_()
    values = function(feature)
    weight = torch.ones_like(values, requires_grad=True)

    def differentiate_twice() -> None:
        (first,) = torch.autograd.grad(values, feature, weight, create_graph=True)
        torch.autograd.grad(first.sum(), weight)

    with pytest.raises(RuntimeError):
        differentiate_twice()


def test_forward_mode_over_a_backward_pass_is_refused() -> None:
    feature = features().requires_grad_()
    pooled = qf.max_correlation(feature, features(seed=2))
    with forward_ad.dual_level():
        tangent = forward_ad.make_dual(torch.ones_like(pooled), torch.ones_like(pooled))
        with pytest.raises(RuntimeError, match=r"forward.mode"):
            torch.autograd.grad(pooled, feature, tangent)
