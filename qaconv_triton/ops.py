"""The operations as `torch.library` ops: fakes, autograd, and the choice of a backend.

CUDA tensors go to the Triton kernels in `kernels/`, CPU tensors and fp64 to the functions of the same names in `cpu/`.
`QACONV_TRITON_BACKEND=triton|torch` forces either, so that the kernels run on a CPU under `TRITON_INTERPRET=1`.

Maps travel as `[.., C, H, W]`, in any memory format; inside they are seen as `[.., S, C]`, which costs nothing for
channels-last ones. Outputs and gradients are laid out channels-last.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._C._functorch import TransformType
from torch.autograd import forward_ad
from torch.cuda import device_of

from .common.backward import BackwardInputs
from .common.dtypes import accumulation_dtype, argmax_dtype
from .common.functions import applying
from .common.inverted_index import InvertedIndex, packed_index, packed_size
from .kernels import config
from .progress import progress_of_search

BACKEND_VARIABLE = "QACONV_TRITON_BACKEND"


def uses_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors of `dtype` on `device` are for the Triton kernels.

    Raises:
        ValueError: `QACONV_TRITON_BACKEND` is neither empty, "triton" nor "torch".
        ModuleNotFoundError: it asks for triton, which is not installed.
        RuntimeError: it asks for triton for tensors that compiled kernels cannot take.
    """
    forced = os.environ.get(BACKEND_VARIABLE, "")
    if forced not in ("", "triton", "torch"):
        raise ValueError(f"{BACKEND_VARIABLE}: expected 'triton' or 'torch', got {forced!r}")
    if dtype == torch.float64 or forced == "torch":
        return False
    if forced == "triton":
        if not _has_triton():
            raise ModuleNotFoundError(f"{BACKEND_VARIABLE}=triton, but triton is not installed", name="triton")
        if device.type == "cpu" and not config.INTERPRETED:
            raise RuntimeError(
                f"{BACKEND_VARIABLE}=triton: tensors on the CPU are for Triton's interpreter alone "
                f"(TRITON_INTERPRET=1, set before the import), and compiled kernels for those on a GPU; got {device}"
            )
        return True
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _backend(op: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The module that implements an op for such tensors: `kernels/<op>.py` or `cpu/<op>.py`."""
    return _module(f".{'kernels' if uses_triton(device, dtype) else 'cpu'}.{op}")


@cache
def _module(name: str) -> Any:
    return importlib.import_module(name, __package__)


# Inside an op the device and the dtypes are its inputs': autocast has had its say before.
_without_autocast = torch._C._DisableAutocast


def _locations(maps: Tensor) -> Tensor:
    """`[B, C, H, W]` as `[B, S, C]`, a view."""
    return maps.flatten(2).transpose(1, 2)


def _maps(locations: Tensor, like: Tensor) -> Tensor:
    """`[B, S, C]` as `[B, C, H, W]` with the H and W of `like`, a view."""
    return locations.view(-1, like.shape[2], like.shape[3], like.shape[1]).permute(0, 3, 1, 2)


_library = torch.library.Library("qaconv_triton", "FRAGMENT")  # holds the registrations


_functions: dict[str, Callable[..., Any]] = {}  # of the operators


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make an operator of torch of a function, whose annotations are its schema; `_set_derivative` completes it.

    As `torch.library.custom_op`, whose wrappers load torch's compiler at the first call and cost time at every one.
    """
    name, schema = function.__name__, torch.library.infer_schema(function, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    _functions[name] = function
    overload: Callable[..., Any] = getattr(torch.ops.qaconv_triton, name).default
    return overload


def _fake_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what gives shapes and dtypes of an operator's outputs, without values."""
    registered: Callable[[Callable[..., Any]], Callable[..., Any]] = torch.library.register_fake(
        f"qaconv_triton::{name}", lib=_library
    )
    return registered


def _has_tangent(inputs: tuple[Any, ...]) -> bool:
    """Whether forward-mode differentiation is under way and one of `inputs` takes part in it."""
    if forward_ad._current_level < 0:
        return False
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        return True
    # in torch.func.jvp a wrapper has the tangent, and hides it below autograd
    transform = torch._C._functorch.peek_interpreter_stack()
    is_jvp = transform is not None and transform.key() == TransformType.Jvp
    return is_jvp and any(torch._C._functorch.is_gradtrackingtensor(tensor) for tensor in tensors)


def _set_derivative(name: str, backward: Callable[..., Any], save: Callable[..., Any] | None = None) -> None:
    """Give an operator its gradient: `backward(ctx, *grads)`, from what `save(ctx, inputs, output)` keeps.

    As `torch.library.register_autograd`, with fewer calls around an operator that takes less time itself. It raises on
    forward-mode tangents: torch drops them silently where no input requires a gradient.
    """
    function, overload = _functions[name], getattr(torch.ops.qaconv_triton, name).default

    def compute(keyset: DispatchKeySet, inputs: tuple[Any, ...]) -> Any:
        keyset &= torch._C._after_ADInplaceOrView_keyset
        with torch._C._AutoDispatchBelowAutograd():
            if keyset.highestPriorityTypeId() in (DispatchKey.CPU, DispatchKey.CUDA):  # nothing else has a say
                return function(*inputs)
            return overload.redispatch(keyset, *inputs)

    def forward(ctx: Any, *inputs: Any) -> Any:
        *given, keyset = inputs
        output = compute(keyset, tuple(given))
        if save is not None:
            save(ctx, given, output)
        return output

    def backward_with_keyset(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *backward(ctx, *grads), None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward_with_keyset)}
    with_gradient: Any = type(f"qaconv_triton_{name}", (torch.autograd.Function,), members)

    def differentiable(keyset: DispatchKeySet, *inputs: Any) -> Any:
        if _has_tangent(inputs):
            raise RuntimeError(f"qaconv_triton::{name} has no forward-mode derivative (torch.func.jvp, dual tensors)")
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return applying(with_gradient)(*inputs, keyset)
        return compute(keyset, inputs)

    _library.impl(name, differentiable, "Autograd", with_keyset=True)


@_operator
def prepare_maps(maps: Tensor, visibility: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Feature maps as they are matched: unit length over C at every location, times visibility.

    Args:
        maps: `[B, C, H, W]`; a zero vector stays zero.
        visibility: `[B, 1, H, W]` or `[B, H, W]` fp32 (fp64 for fp64), 1 where None.
        dtype: of the prepared maps.

    Returns:
        prepared maps `[B, C, H, W]`; and in the dtype of sums `[B, S, 2]`: a power of two and a positive number, whose
        product is the inverse norm. Only the former are differentiable, once.
    """
    seen = None if visibility is None else visibility.flatten(1).contiguous()
    with device_of(maps), _without_autocast():
        backend = _backend("prepare_maps", maps.device, torch.promote_types(maps.dtype, dtype))
        prepared, factors = backend.prepare_maps(_locations(maps), seen, dtype)
    return _maps(prepared, maps), factors


@_fake_of("prepare_maps")
def _(maps: Tensor, visibility: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = maps.shape
    prepared = _maps(maps.new_empty(batch, height * width, channels, dtype=dtype), maps)
    return prepared, maps.new_empty(batch, height * width, 2, dtype=accumulation_dtype(maps.dtype))


@_operator
def prepare_maps_backward(
    grad: Tensor, maps: Tensor, visibility: Tensor | None, factors: Tensor, is_unit: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `prepare_maps` to maps and visibility, in their dtypes and shapes; the latter empty without it.

    With `is_unit`, `maps` are the prepared ones: of unit length.
    """
    seen = None if visibility is None else visibility.flatten(1).contiguous()
    with device_of(maps), _without_autocast():
        backend = _backend("prepare_maps", maps.device, torch.promote_types(maps.dtype, grad.dtype))
        to_maps, to_visibility = backend.prepare_maps_backward(
            _locations(grad).contiguous(), _locations(maps), seen, factors, is_unit
        )
    return _maps(to_maps, maps), to_visibility if visibility is None else to_visibility.view(visibility.shape)


@_fake_of("prepare_maps_backward")
def _(grad: Tensor, maps: Tensor, visibility: Tensor | None, factors: Tensor, is_unit: bool) -> tuple[Tensor, Tensor]:
    to_maps = _maps(maps.new_empty(maps.shape[0], maps.shape[2] * maps.shape[3], maps.shape[1]), maps)
    return to_maps, factors.new_empty(0 if visibility is None else visibility.shape)


def _save_maps(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    maps, visibility, dtype = inputs
    prepared, factors = output
    # what is kept anyway for the matching that follows, where that has not been rounded or weighted
    ctx.is_unit = visibility is None and maps.dtype == dtype == factors.dtype
    ctx.save_for_backward(prepared if ctx.is_unit else maps, visibility, factors)
    ctx.mark_non_differentiable(factors)
    ctx.set_materialize_grads(False)


def _backward_of_maps(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    to_maps, to_visibility = prepare_maps_backward(grad, *ctx.saved_tensors, ctx.is_unit)
    needs_maps, needs_visibility = ctx.needs_input_grad[:2]
    return to_maps if needs_maps else None, to_visibility if needs_visibility else None, None


_set_derivative("prepare_maps", _backward_of_maps, _save_maps)


@_operator
def max_correlation(
    probe: Tensor,
    gallery: Tensor,
    index: Tensor | None,
    group: Tensor | None,
    normalize_gallery: bool,
    sparse_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best match of every location, both ways.

    Args:
        probe: `[P, C, H, W]` prepared maps (normalised, weighted); their dtype is the correlation's.
        gallery: `[G, C, H, W]` prepared likewise, or raw with `normalize_gallery`; any floating dtype.
        index: int64 `[P, K]` gallery rows for each probe, None for all of them. Negative: a pair of NaN.
        group: int64 `[P]`; probes of equal group have equal rows of `index`, and share the reading of them.
        normalize_gallery: normalise the gallery maps over C, touching only those in `index`.
        sparse_grad: the gallery's gradient is a sparse COO tensor of the touched rows.

    Returns:
        pooled `[P, K or G, 2S]` fp32 (fp64 for fp64): the maximum over r for every s, then over s for every r;
        argmax of that shape, of `argmax_dtype`, lowest index first; inverse norms of the gallery maps in `index`, in
        the order of their ids, `[T, S]`, or of all of them, `[G, S]`, empty without `normalize_gallery`; and the
        inverted index of `index`, packed, empty without one. Only pooled is differentiable, once.
    """
    backend = _backend("max_correlation", probe.device, probe.dtype)
    index = None if index is None else index.contiguous()
    with device_of(probe), _without_autocast():
        inverted = None
        if index is None:
            packed = probe.new_empty(0, dtype=torch.int64)
        else:
            packed = packed_index(index, gallery.shape[0])
            inverted = InvertedIndex.unpacked(packed, index.numel())
        maps = _locations(probe).contiguous()
        pooled, argmax, rnorm = backend.max_correlation(
            maps, _locations(gallery), index, group, inverted, normalize_gallery
        )
    return pooled, argmax, rnorm, packed


@_fake_of("max_correlation")
def _(
    probe: Tensor,
    gallery: Tensor,
    index: Tensor | None,
    group: Tensor | None,
    normalize_gallery: bool,
    sparse_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    probes = probe.shape[0]
    neighbors = gallery.shape[0] if index is None else index.shape[1]
    locations = probe.shape[2] * probe.shape[3]
    dtype = accumulation_dtype(probe.dtype)
    pooled = probe.new_empty(probes, neighbors, 2 * locations, dtype=dtype)
    argmax = probe.new_empty(probes, neighbors, 2 * locations, dtype=argmax_dtype(locations))
    pairs, maps = probes * neighbors, gallery.shape[0]
    slots = maps if index is None else min(pairs, maps)
    rnorm = probe.new_empty((slots, locations) if normalize_gallery else (0,), dtype=dtype)
    packed = probe.new_empty(0 if index is None else packed_size(pairs, maps), dtype=torch.int64)
    return pooled, argmax, rnorm, packed


@_operator
def pair_sums(
    probe: Tensor, gallery: Tensor, index: Tensor | None, group: Tensor | None, normalize_gallery: bool, weight: Tensor
) -> Tensor:
    """One number per pair, `[P, K or G]`: `weight [2S]` times the pooled values that `max_correlation` would return.

    Neither these nor where the best matches are is kept. Not differentiable. `weight` has the dtype of the result.
    """
    index = None if index is None else index.contiguous()
    weight, maps, keys = weight.contiguous(), _locations(probe).contiguous(), _locations(gallery)
    with device_of(probe), _without_autocast():
        backend = _backend("max_correlation", probe.device, probe.dtype)
        sums: Tensor = backend.pair_sums(maps, keys, index, group, normalize_gallery, weight)
    return sums


@_fake_of("pair_sums")
def _(
    probe: Tensor, gallery: Tensor, index: Tensor | None, group: Tensor | None, normalize_gallery: bool, weight: Tensor
) -> Tensor:
    neighbors = gallery.shape[0] if index is None else index.shape[1]
    return probe.new_empty(probe.shape[0], neighbors, dtype=accumulation_dtype(probe.dtype))


@_operator
def max_correlation_backward(
    grad: Tensor,
    pooled: Tensor,
    argmax: Tensor,
    rnorm: Tensor,
    packed: Tensor,
    probe: Tensor,
    gallery: Tensor,
    index: Tensor | None,
    group: Tensor | None,
    rows: Tensor | None,
    needs_probe: bool,
    needs_gallery: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `max_correlation` to probe and gallery, in their dtypes; empty where not needed.

    `rows` int64 `[T]`, ascending: the gallery rows in `index`; the gallery's gradient is then `[T, C, H, W]`.
    """
    index = None if index is None else index.contiguous()
    inverted = None if index is None else InvertedIndex.unpacked(packed, index.numel())
    maps, keys = _locations(probe).contiguous(), _locations(gallery)
    saved = BackwardInputs(grad.contiguous(), pooled, argmax, rnorm, inverted, maps, keys, index, group)
    with device_of(probe), _without_autocast():
        backend = _backend("max_correlation", probe.device, probe.dtype)
        to_probe, to_gallery = backend.max_correlation_backward(saved, rows, needs_probe, needs_gallery)
    return (
        _maps(to_probe, probe) if needs_probe else to_probe,
        _maps(to_gallery, gallery) if needs_gallery else to_gallery,
    )


@_fake_of("max_correlation_backward")
def _(
    grad: Tensor,
    pooled: Tensor,
    argmax: Tensor,
    rnorm: Tensor,
    packed: Tensor,
    probe: Tensor,
    gallery: Tensor,
    index: Tensor | None,
    group: Tensor | None,
    rows: Tensor | None,
    needs_probe: bool,
    needs_gallery: bool,
) -> tuple[Tensor, Tensor]:
    channels, height, width = probe.shape[1:]
    count = gallery.shape[0] if rows is None else rows.shape[0]
    to_probe, to_gallery = probe.new_empty(0), gallery.new_empty(0)
    if needs_probe:
        to_probe = _maps(probe.new_empty(probe.shape[0], height * width, channels), probe)
    if needs_gallery:
        to_gallery = _maps(gallery.new_empty(count, height * width, channels), gallery)
    return to_probe, to_gallery


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    probe, gallery, index, group, _, ctx.sparse_grad = inputs
    ctx.save_for_backward(*output, probe, gallery, index, group)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    pooled, argmax, rnorm, packed, probe, gallery, index, group = ctx.saved_tensors
    needs_probe, needs_gallery = ctx.needs_input_grad[:2]
    rows = None
    if ctx.sparse_grad and index is not None and needs_gallery:
        classes = InvertedIndex.unpacked(packed, index.numel()).classes
        rows = classes[classes >= 0]
    to_probe, to_gallery = max_correlation_backward(
        grad, pooled, argmax, rnorm, packed, probe, gallery, index, group, rows, needs_probe, needs_gallery
    )
    if rows is not None:
        values = to_gallery.contiguous()
        with torch.sparse.check_sparse_tensor_invariants(False):  # torch 2.11 and 2.12 warn despite the argument
            to_gallery = torch.sparse_coo_tensor(
                rows.unsqueeze(0), values, gallery.shape, device=values.device, is_coalesced=True
            )
    return to_probe if needs_probe else None, to_gallery if needs_gallery else None, None, None, None, None


_set_derivative("max_correlation", _backward, _save_for_backward)


@_operator
def cosine_topk(
    queries: Tensor,
    keys: Tensor | None,
    k: int,
    previous: Tensor | None,
    workspace_bytes: int | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The k keys `[N, D]` of largest cosine for every query `[P, D]`; without keys, the other queries.

    See `functional.class_neighbors` for what bounds and steers the search.
    """
    device = queries.device if device is None else torch.empty(0, device=device).device
    dtype = dtype or queries.dtype
    queries, keys = queries.contiguous(), None if keys is None else keys.contiguous()
    progress = progress_of_search.get()
    with device_of(torch.empty(0, device=device)), _without_autocast():
        backend = _backend("cosine_topk", device, dtype)
        similarities, indices = backend.cosine_topk(
            queries, keys, k, previous, workspace_bytes, device, dtype, progress
        )
    return similarities, indices


@_fake_of("cosine_topk")
def _(
    queries: Tensor,
    keys: Tensor | None,
    k: int,
    previous: Tensor | None,
    workspace_bytes: int | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    shape, device = (queries.shape[0], k), device or queries.device
    accumulated = accumulation_dtype(dtype or queries.dtype)
    return queries.new_empty(shape, dtype=accumulated, device=device), queries.new_empty(
        shape, dtype=torch.int64, device=device
    )


def mutual_topk(left: Tensor, right: Tensor, k: int, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """The k rows of `right [m, D]` of largest cosine for every row of `left [n, D]`, and the reverse, in one product.

    No op of torch, for no compiled code calls it: see `kernels.cosine_topk.mutual_topk`.
    """
    left, right = left.contiguous(), right.contiguous()
    # Candidates must exceed a threshold; those that equal the k-th best so far may have a lower id, and are wanted.
    thresholds = torch.nextafter(thresholds, thresholds.new_tensor(-torch.inf))
    with device_of(left), _without_autocast():
        found: tuple[Tensor, Tensor] = _backend("cosine_topk", left.device, left.dtype).mutual_topk(
            left, right, k, thresholds
        )
    return found


def _no_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError("qaconv_triton: trying to differentiate an operator that has no derivative, such as a gradient")


for _name in ("prepare_maps_backward", "max_correlation_backward", "pair_sums", "cosine_topk"):
    _set_derivative(_name, _no_derivative)
