"""Exact top-k by cosine on the CPU; within one table every unordered pair of blocks is multiplied once.

The similarity passes by in blocks that fit the workspace. Each row keeps its k best so far; a block improves the lists
of its rows and, where queries and keys are one table, of its columns. Three things keep that cheaper than the product:

- A row of a block is cut into strided chunks. The k best entries lie in the k chunks with the highest peaks, so that
  only peaks and the members of those chunks are selected from: about `2 sqrt(m k)` numbers instead of m.
- Peaks that do not exceed the row's k-th best so far are out at once, so later blocks look at fewer chunks.
- A block is visited while it is in cache, and its transpose is taken in contiguous pieces.

Ids pass by in rising order in every list, so an entry that only equals the k-th best so far has lost its tie.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .cpu import accumulation_dtype, inverse_norm

ROWS = 512  # of a product at a time
LISTS = 128  # of a selection at a time: what it allocates should come from the heap, not page by page from the system
FEWEST_ROWS = 4096  # of a block, so that a list is not improved too often
MIRROR_DIM = 256  # from this size on, copying the mirrored half of a diagonal block is cheaper than multiplying it


def cosine_topk(
    queries: Tensor, keys: Tensor, k: int, exclude_self: bool, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    """As `kernels.cosine_topk.cosine_topk`, for `queries [P, D]` and `keys [N, D]`.

    Where the two are one table, half of the product is enough.
    """
    symmetric = exclude_self and queries.data_ptr() == keys.data_ptr() and queries.shape == keys.shape
    dtype = accumulation_dtype(queries.dtype)
    num_queries, num_keys = queries.shape[0], keys.shape[0]
    values = queries.new_full((num_queries, k), -torch.inf, dtype=dtype)
    ids = queries.new_full((num_queries, k), -1, dtype=torch.int64)
    if num_queries == 0 or k == 0:
        return values, ids
    rnorm_keys = inverse_norm(keys, dtype)
    rnorm_queries = rnorm_keys if symmetric else inverse_norm(queries, dtype)
    room = queries.new_empty(min(max(workspace_bytes // dtype.itemsize, 1), num_queries * num_keys), dtype=dtype)
    for rows, columns in _blocks(num_queries, num_keys, room.numel(), symmetric):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        block = room[: height * width].view(height, width)
        mirrored = symmetric and rows.start == columns.start
        _multiply(block, queries, keys, rnorm_queries, rnorm_keys, rows, columns, mirrored)
        if exclude_self:
            block.diagonal(rows.start - columns.start).fill_(-torch.inf)
        for start in range(0, height, LISTS):
            part = slice(start, min(start + LISTS, height))
            _improve(values, ids, slice(rows.start + part.start, rows.start + part.stop), block[part], columns.start)
        if symmetric:  # the columns that are not rows of this block as well
            for start in range(max(rows.stop - columns.start, 0), width, LISTS):
                part = slice(start, min(start + LISTS, width))
                lists = slice(columns.start + part.start, columns.start + part.stop)
                _improve(values, ids, lists, _transposed(block[:, part]), rows.start)
    return _ordered(values, ids)


def _blocks(num_queries: int, num_keys: int, room: int, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Cut the similarity, or its upper triangle, into blocks of at most `room` entries, columns rising in each row."""
    start = 0
    while start < num_queries:
        first = start if symmetric else 0
        width = min(num_keys - first, max(1, room // min(FEWEST_ROWS, num_queries - start)))
        height = min(num_queries - start, max(1, room // width))
        if symmetric and first + width < num_keys:
            height = min(height, width)  # the first block of the rows holds their whole diagonal
        for column in range(first, num_keys, width):
            yield slice(start, start + height), slice(column, min(column + width, num_keys))
        start += height


def _multiply(
    block: Tensor,
    queries: Tensor,
    keys: Tensor,
    rnorm_queries: Tensor,
    rnorm_keys: Tensor,
    rows: slice,
    columns: slice,
    mirrored: bool,
) -> None:
    """Fill `block` with the cosines of `queries[rows]` and `keys[columns]`; `mirrored`: the two begin together."""
    height, width = block.shape
    mirrored = mirrored and queries.shape[1] >= MIRROR_DIM
    for top in range(0, height, ROWS):
        bottom = min(top + ROWS, height)
        there = slice(rows.start + top, rows.start + bottom)
        unit = queries[there].to(block.dtype) * rnorm_queries[there, None]
        for left in range(top if mirrored else 0, width, 4 * ROWS):
            right = min(left + 4 * ROWS, width)
            there = slice(columns.start + left, columns.start + right)
            _multiply_into(block[top:bottom, left:right], unit, keys[there].to(block.dtype))
            block[top:bottom, left:right] *= rnorm_keys[there]
        if mirrored and bottom < height:
            block[bottom:, top:bottom] = _transposed(block[top:bottom, bottom:height])


def _multiply_into(out: Tensor, rows: Tensor, columns: Tensor) -> None:
    """`out = rows @ columns.mT`, each element summed in the same order: BLAS has another for a single row or column."""
    if min(out.shape) > 1:
        torch.mm(rows, columns.mT, out=out)
        return
    twice = [torch.cat([part, part]) if part.shape[0] == 1 else part for part in (rows, columns)]
    out.copy_((twice[0] @ twice[1].mT)[: out.shape[0], : out.shape[1]])


def _transposed(block: Tensor) -> Tensor:
    """`block.mT`, contiguous; a contiguous source is transposed tile by tile."""
    return block.contiguous().mT.contiguous()


def _improve(values: Tensor, ids: Tensor, rows: slice, similarity: Tensor, first_id: int) -> None:
    """Improve the lists of `rows` by the entries of `similarity [rows, m]`, whose columns are ids from `first_id`."""
    k, width = values.shape[1], similarity.shape[1]
    kept, kept_ids = values[rows], ids[rows]
    is_first = bool(kept_ids[0, 0] < 0)
    found, found_ids = _contenders(similarity, None if is_first else kept.amin(1, keepdim=True), k)
    found_ids = found_ids + first_id
    if not is_first or found.shape[1] < k:
        found, found_ids = torch.cat([kept, found], dim=1), torch.cat([kept_ids, found_ids], dim=1)
    best, where = found.topk(min(k + 1, found.shape[1]), dim=1)
    best_ids = found_ids.gather(1, where[:, :k])
    if best.shape[1] > k:  # where the k-th equals the next one, which ids belong is a matter of order, not of chance
        runner_up = best[:, k]
        tied = ((best[:, k - 1] == runner_up) & (runner_up > -torch.inf)) | runner_up.isnan()
        for part in tied.nonzero().flatten().split(64):
            in_order, order = kept_ids[part].sort(dim=1)
            row = torch.cat([kept[part].gather(1, order), similarity[part]], dim=1)
            everyone = torch.arange(first_id, first_id + width, device=ids.device).expand(len(part), -1)
            chosen = _first_largest(row, best[part, k - 1 : k], k)
            best[part, :k] = row[chosen].view(-1, k)
            best_ids[part] = torch.cat([in_order, everyone], dim=1)[chosen].view(-1, k)
    values[rows], ids[rows] = best[:, :k], best_ids


def _contenders(similarity: Tensor, bar: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Entries `[rows, c]`, with their columns, that hold the k + 1 best of each row, as far as they exceed its bar."""
    width = similarity.shape[1]
    chunk = int((width / k) ** 0.5)
    chunks = width // max(chunk, 1)
    if chunk < 2 or chunks <= k + 1:
        return similarity, torch.arange(width, device=similarity.device).expand_as(similarity)
    peaks = similarity[:, : chunk * chunks].unflatten(1, (chunk, chunks)).amax(1)
    needed = k + 1
    if bar is not None:
        needed = min(needed, int((peaks <= bar).logical_not_().sum(1, dtype=torch.int32).amax()))  # NaN is needed
    best = peaks.topk(needed, dim=1, sorted=False).indices
    steps = torch.arange(chunk, device=similarity.device) * chunks
    rest = torch.arange(chunk * chunks, width, device=similarity.device).expand(len(best), -1)
    columns = torch.cat([(best.unsqueeze(1) + steps.unsqueeze(1)).flatten(1), rest], dim=1)
    return similarity.gather(1, columns), columns


def _first_largest(row: Tensor, bar: Tensor, k: int) -> Tensor:
    """Mark the k largest of every row, whose k-th is `bar [rows, 1]`; of those that equal it, the first."""
    equal = torch.where(bar.isnan(), row.isnan(), row == bar)
    above = ((row > bar) | row.isnan()) & ~equal
    return above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))


def _ordered(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Put every list in falling order, NaN first, equal values by rising id. Lists are mostly in order already."""
    for start in range(0, values.shape[0], ROWS):
        part = slice(start, start + ROWS)
        loose = ~(values[part, 1:] < values[part, :-1]).all(1)
        rows = start + loose.nonzero().flatten()
        in_order, order = ids[rows].sort(dim=1)
        values[rows], order = values[rows].gather(1, order).sort(dim=1, descending=True, stable=True)
        ids[rows] = in_order.gather(1, order)
    return values, ids
