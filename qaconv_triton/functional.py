"""Public functions: cosine top-k, the class graph, maximum correlation; how maps are prepared for all scores."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import ops
from .common.candidates import rescored_topk
from .common.dtypes import accumulation_dtype
from .kernels import config
from .progress import Progress, progress_reported_to
from .validation import (
    check_count,
    check_device,
    check_finite_rows,
    check_flag,
    check_index,
    check_layout,
    check_maps,
    check_visibility,
    refuse_tangent,
    values_may_be_read,
)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _embeddings(values: Tensor, name: str) -> Tensor:
    """Check `[N, D]` or `[N, C, H, W]` embeddings and flatten them to `[N, D]`, without a copy where possible."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a tensor [N, D] or [N, C, H, W], got {type(values).__name__}")
    check_layout(values, name)
    if values.dim() not in (2, 4):
        raise ValueError(f"{name}: expected [N, D] or [N, C, H, W], got shape {list(values.shape)}")
    if 0 in values.shape[1:]:
        raise ValueError(f"{name}: expected embeddings of at least one number, got shape {list(values.shape)}")
    if values.shape[0] > config.MAX_ROWS:
        raise ValueError(f"{name}: expected at most {config.MAX_ROWS} embeddings, got shape {list(values.shape)}")
    if values.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {values.dtype}")
    if values.dim() == 4:
        # Cosine does not mind the order of coordinates: take the one in memory.
        values = values.permute(0, 2, 3, 1) if values.is_contiguous(memory_format=torch.channels_last) else values
    refuse_tangent(values, name)
    return values.detach().flatten(1)


def topk_cosine(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k keys of largest cosine similarity for every query, exactly, without the `[P, N]` matrix.

    Args:
        queries: `[P, D]` (or `[P, C, H, W]`, flattened), float16, bfloat16, float32 or float64.
        keys: `[N, D]` (or `[N, C, H, W]`), same dtype and device.
        k: between 1 and N.

    Returns:
        similarities `[P, k]`, descending, fp32 (fp64 for fp64), and indices int64 `[P, k]`; ties by ascending
        index. A zero vector has similarity 0 with everything. Not differentiable.

    Raises:
        TypeError: integer or complex inputs, dtypes that differ, k not an int.
        ValueError: shapes that do not fit, tensors on different devices, k out of range.

    Examples:
        >>> similarities, indices = topk_cosine(torch.eye(3), torch.tensor([[1.0, 0, 0], [1, 1, 0]]), k=1)
        >>> indices.flatten().tolist()
        [0, 1, 0]
    """
    flat_queries, flat_keys = _embeddings(queries, "queries"), _embeddings(keys, "keys")
    if queries.shape[1:] != keys.shape[1:]:
        raise ValueError(f"queries {list(queries.shape)} and keys {list(keys.shape)} differ in more than their number")
    if queries.dtype != keys.dtype:
        raise TypeError(f"queries are {queries.dtype}, but keys are {keys.dtype}")
    if queries.dim() == 4 and _layout(queries) != _layout(keys):
        flat_queries, flat_keys = queries.detach().flatten(1), keys.detach().flatten(1)
    check_device(queries, "queries", keys.device, "keys")
    k = check_count(k, "k", low=1, high=keys.shape[0], why=f"there are {keys.shape[0]} keys")
    similarities, indices = ops.cosine_topk(flat_queries, flat_keys, k, None, None, None, None)
    return similarities, indices


def _layout(maps: Tensor) -> bool:
    return maps.is_contiguous(memory_format=torch.channels_last)


@overload
def class_neighbors(
    embeddings: Tensor,
    k: int,
    *,
    return_similarities: Literal[False] = False,
    previous: Tensor | None = None,
    dtype: torch.dtype | None = None,
    rescore: bool = False,
    workspace_bytes: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | Progress = False,
) -> Tensor: ...
@overload
def class_neighbors(
    embeddings: Tensor,
    k: int,
    *,
    return_similarities: Literal[True],
    previous: Tensor | None = None,
    dtype: torch.dtype | None = None,
    rescore: bool = False,
    workspace_bytes: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | Progress = False,
) -> tuple[Tensor, Tensor]: ...
def class_neighbors(
    embeddings: Tensor,
    k: int,
    *,
    return_similarities: bool = False,
    previous: Tensor | None = None,
    dtype: torch.dtype | None = None,
    rescore: bool = False,
    workspace_bytes: int | None = None,
    device: torch.device | str | None = None,
    progress: bool | Progress = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Find the k nearest other classes of every class by cosine similarity (graph sampling, arXiv:2104.01546).

    A class is left out of its own list by id, so classes with coinciding embeddings are each other's neighbours.
    Exact; memory beyond the output is O(N k) and a bounded workspace, never `[N, N]`.

    Args:
        embeddings: class table `[N, C, H, W]` or `[N, D]`, float16, bfloat16, float32 or float64. A table that does
            not fit the device stays on the CPU, or in a memory-mapped file, and is streamed; see `device`.
        k: between 1 and N - 1.
        return_similarities: also return the similarities.
        previous: int64 `[N, k]`, an earlier graph of the same classes. The neighbours are the same but for rounding,
            and found sooner if they have changed little. Not used with `rescore`.
        dtype: what the products are taken in, the embeddings' dtype where None; sums are fp32 (fp64 for fp64).
            float32 follows `torch.set_float32_matmul_precision`.
        rescore: find somewhat more than k candidates, then rank them by similarities taken in fp32 from the
            embeddings as given: what products in half precision cost in recall, almost always, comes back.
        workspace_bytes: what may be held beyond O(N k), among it the pieces of a streamed table and, on a GPU, the
            candidates. By default half of a GPU's free memory, 256 MB on the CPU.
        device: where to compute, and where the result is; the embeddings' device where None.
        progress: True for a bar (by tqdm, on a terminal; elsewhere a line now and then), or a function that is called
            with what is done and what there is to do.

    Returns:
        int64 `[N, k]` class ids in descending similarity, ties by ascending id; with `return_similarities`,
        `(similarities, ids)`, the former fp32 (fp64 for fp64) `[N, k]`. Not differentiable.

    Raises:
        TypeError: integer or complex embeddings or dtype, k not an int, `previous` not int64.
        ValueError: another shape, k or workspace_bytes out of range, NaN or Inf in the table (naming the first such
            classes), float64 asked of narrower embeddings or the reverse.
        IndexError: an id in `previous` outside `[0, N)`.

    Examples:
        >>> class_neighbors(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), k=1).flatten().tolist()
        [1, 0, 1]
    """
    flat = _embeddings(embeddings, "embeddings")
    classes = flat.shape[0]
    k = check_count(k, "k", low=1, high=classes - 1, why=f"each of {classes} classes has {classes - 1} others")
    if workspace_bytes is not None:
        workspace_bytes = check_count(workspace_bytes, "workspace_bytes", low=1, high=2**63 - 1, why="it bounds memory")
    for flag, name in ((return_similarities, "return_similarities"), (rescore, "rescore")):
        check_flag(flag, name)
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress: expected True, False or a function of (done, total), got {progress!r}")
    target = flat.device if device is None else _device(device)
    if flat.is_meta or target.type == "meta":
        raise ValueError(f"embeddings on {flat.device} and device {target}: no values to compare on the meta device")
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"dtype: expected float16, bfloat16, float32 or float64, got {dtype}")
    if dtype is not None and (dtype == torch.float64) != (flat.dtype == torch.float64):
        raise ValueError(f"dtype: {dtype} products of {flat.dtype} embeddings; convert the embeddings first")
    if previous is not None:
        _check_previous(previous, classes, k)
    if not torch.compiler.is_compiling():
        check_finite_rows(flat, "embeddings")
    with progress_reported_to(progress):
        if rescore and flat.dtype != torch.float64:
            wide = min(k + max(16, k // 4), classes - 1)
            _, candidates = ops.cosine_topk(flat, None, wide, None, workspace_bytes, target, dtype)
            similarities, indices = rescored_topk(flat, candidates, k)
        else:
            similarities, indices = ops.cosine_topk(flat, None, k, previous, workspace_bytes, target, dtype)
    return (similarities, indices) if return_similarities else indices


def _device(device: torch.device | str) -> torch.device:
    """A device that tensors can be made on, with its number.

    Raises:
        TypeError, ValueError: not a device, or none that this torch can use.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: expected a torch.device or its name, got {type(device).__name__}")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ValueError(f"device: {str(device)!r} cannot be used here ({str(error).splitlines()[0]})") from error


def _check_previous(previous: Tensor, classes: int, k: int) -> None:
    if not isinstance(previous, Tensor) or previous.dtype != torch.int64:
        got = previous.dtype if isinstance(previous, Tensor) else type(previous).__name__
        raise TypeError(f"previous: expected an int64 tensor [{classes}, {k}], got {got}")
    check_layout(previous, "previous")
    if previous.is_meta:
        raise ValueError("previous: no values on the meta device")
    if tuple(previous.shape) != (classes, k):
        raise ValueError(f"previous: expected shape [{classes}, {k}], got {list(previous.shape)}")
    if not torch.compiler.is_compiling():
        check_index(previous, classes, "previous", "classes")


def correlation_dtype(maps: Tensor) -> torch.dtype:
    """The dtype correlations of `maps` are taken in: autocast's where it is on, else their own."""
    if torch.is_autocast_enabled(maps.device.type) and maps.dtype != torch.float64:
        return torch.get_autocast_dtype(maps.device.type)
    return maps.dtype


def prepare_maps(maps: Tensor, visibility: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Normalise `maps [B, C, H, W]` over C at every location, weight them by visibility, and cast, channels-last.

    The arithmetic is fp32 (fp64 for fp64), whatever the maps' dtype. A zero vector stays zero.
    """
    if visibility is not None:
        visibility = visibility.to(accumulation_dtype(maps.dtype))
    prepared: Tensor = ops.prepare_maps(maps, visibility, dtype)[0]
    return prepared


def max_correlation(
    probe: Tensor,
    gallery: Tensor,
    index: Tensor | None = None,
    *,
    probe_occ: Tensor | None = None,
    gallery_occ: Tensor | None = None,
) -> Tensor:
    """Compare every location of probe maps with every location of gallery maps and keep the best match, both ways.

    `corr[p, g, r, s] = w_p[s] w_g[r] <probe[p, :, s], gallery[g, :, r]>` with both maps normalised over C; the
    `[S, S]` correlations are never materialised. (QAConv, arXiv:1904.10424, section 3.2.)

    Args:
        probe: `[P, C, H, W]`, float16, bfloat16, float32 or float64.
        gallery: `[G, C, H, W]`; follows the probe's dtype. Under autocast both take autocast's.
        index: int64 `[P, K]` rows of `gallery` to compare each probe with; every pair where None.
        probe_occ: visibility of probe locations `[P, 1, H, W]`, in [0, 1]; 1 where None.
        gallery_occ: visibility of gallery locations `[G, 1, H, W]`.

    Returns:
        pooled `[P, G, 2S]`, or `[P, K, 2S]` with `index`, fp32 (fp64 for fp64): the maximum over r for each s, then
        the maximum over s for each r. Differentiable in maps and visibility; a tie goes to the lowest location.

    Raises:
        TypeError: integer or complex maps, index not int64.
        ValueError: shapes or devices that do not fit.
        IndexError: an index outside `[0, G)`; on CUDA such a pair is NaN unless `QACONV_TRITON_CHECKS=1`.

    Examples:
        >>> maps = torch.randn(2, 8, 3, 3)
        >>> max_correlation(maps, maps).shape
        torch.Size([2, 2, 18])
    """
    check_maps(probe, "probe")
    channels, height, width = probe.shape[1:]
    check_maps(gallery, "gallery", channels=channels, height=height, width=width)
    check_device(gallery, "gallery", probe.device, "probe")
    for visibility, name, maps in ((probe_occ, "probe_occ", probe), (gallery_occ, "gallery_occ", gallery)):
        if visibility is not None:
            check_visibility(visibility, name, maps)
    if index is not None:
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index: expected an int64 tensor [{probe.shape[0]}, K], got {got}")
        check_layout(index, "index")
        if index.dim() != 2 or index.shape[0] != probe.shape[0]:
            raise ValueError(f"index: expected shape [{probe.shape[0]}, K], got {list(index.shape)}")
        check_device(index, "index", probe.device, "probe")
        if values_may_be_read(index):
            check_index(index, gallery.shape[0], "index", "gallery items")
        else:
            index = torch.where(index < gallery.shape[0], index, -1)
    dtype = correlation_dtype(probe)
    ready = prepare_maps(probe, probe_occ, dtype), prepare_maps(gallery, gallery_occ, dtype)
    pooled: Tensor = ops.max_correlation(*ready, index, None, False, False)[0]
    return pooled
