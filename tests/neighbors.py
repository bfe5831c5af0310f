"""Checks of nearest neighbours, by cosine, against fp64."""

from __future__ import annotations

import torch
from exact import by_falling_similarity, exact_cosines
from tolerances import TOLERANCES
from torch import Tensor
from torch.nn import functional as F

from qaconv_triton import functional, reference


def search(table: Tensor, k: int, exclude_self: bool = True, **options: object) -> tuple[Tensor, Tensor]:
    """Similarities and indices within one table, each row without itself or with it."""
    if exclude_self:
        values, indices = functional.class_neighbors(table, k, return_similarities=True, **options)  # type: ignore[call-overload]
        return values, indices
    return functional.topk_cosine(table, table, k, **options)  # type: ignore[arg-type]


def check(
    queries: Tensor,
    keys: Tensor,
    k: int,
    exclude_self: bool,
    values: Tensor,
    indices: Tensor,
    decided: float = 0.9,
    rounded: torch.dtype | None = None,
) -> None:
    """Assert that a result is one of those that rounding allows: order, ties by rising id, values, and the set.

    Args:
        decided: at least this share of places must be so far from the next ones that only one index is right there.
        rounded: the dtype in which the search takes products, where that is not the inputs'.
    """
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    rounding = TOLERANCES[rounded or wide].tie
    assert values.shape == indices.shape == (queries.shape[0], k)
    assert values.dtype == wide
    assert indices.dtype == torch.int64

    # whatever the data
    assert (values.diff(dim=1) <= 0).all(), "not falling"
    assert ((indices >= 0) & (indices < keys.shape[0])).all()
    assert (indices.sort(dim=1).values.diff(dim=1) > 0).all(), "an index twice"
    ids = torch.arange(queries.shape[0], device=queries.device)
    if exclude_self:
        assert (indices != ids[:, None]).all(), "self among the neighbours"
    tied = values.diff(dim=1) == 0
    assert (indices.diff(dim=1)[tied] > 0).all(), "equal similarities not by rising id"
    unit_queries, unit_keys = reference.normalize(queries.double()), reference.normalize(keys.double())
    true_values = (unit_queries[:, None] * unit_keys[indices]).sum(-1)
    assert (values - true_values).abs().max() <= rounding

    # beside the true neighbours
    every_value, every_index = reference.cosine_topk(
        unit_queries, unit_keys, keys.shape[0] - int(exclude_self), exclude_self
    )
    assert (every_value[:, :k] - true_values).abs().max() <= 2 * rounding
    gaps = F.pad(-every_value.diff(dim=1), (1, 1), value=torch.inf)
    sole = torch.minimum(gaps[:, :-1], gaps[:, 1:])[:, :k] > 2 * rounding
    assert sole.double().mean() >= decided, "too many near ties in the data to test the order"
    assert torch.equal(indices[sole], every_index[:, :k][sole])
    # the set is right wherever the k-th and the next differ, whatever the order within
    is_last_clear = gaps[:, k] > 2 * rounding
    same = indices.sort(dim=1).values == every_index[:, :k].sort(dim=1).values
    assert same[is_last_clear].all()


def check_exactly(table: Tensor, k: int, values: Tensor, indices: Tensor, exclude_self: bool = True) -> None:
    """Assert the one right result of a table whose products are exact."""
    similarity = exact_cosines(table, table)
    assert torch.equal(indices, by_falling_similarity(similarity, k, exclude_self))
    assert torch.equal(values, similarity.gather(1, indices).float())
