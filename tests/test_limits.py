"""Sizes and numbers at the limits of 32-bit indices and of fp16.

Launches of the largest sizes run on meta tensors: no memory, no values. Of the interpreter's programs the first and the
last run, of every loop the first and the last turn, and every address is checked against the tensor it belongs to;
integers of 32 bits that overflow on the way end the run.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from tolerances import TOLERANCES, assert_gradients, cosine_between
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

import triton
import triton.language as tl

from qaconv_triton import functional, ops, reference
from qaconv_triton.common import candidates
from qaconv_triton.common.chunks import Chunk
from qaconv_triton.common.inverted_index import InvertedIndex
from qaconv_triton.kernels import (
    config,
    max_correlation,
    max_correlation_backward,
    prepare_maps,
    topk_kernels,
    topk_search,
)
from qaconv_triton.kernels.tiles import sortable, unsortable

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
META = torch.device("meta")
REGION = 2**50  # bytes between the tensors of a launch
AXES = 2**31 - 1, 65_535, 65_535  # programs on the axes of a launch (CUDA programming guide)


@triton.jit
def _strided(p_out, stride, count):
    o_lane = tl.arange(0, 4)
    tl.store(p_out + o_lane * stride, o_lane, mask=o_lane < count)


@triton.jit
def _to_keys_and_back(p_values, p_keys, p_back):
    o_lane = tl.arange(0, 16)
    b_key = sortable(tl.load(p_values + o_lane))
    tl.store(p_keys + o_lane, b_key)
    tl.store(p_back + o_lane, unsortable(b_key))


class _Launched(Exception):
    """Ends a launcher behind its kernel: from there on it may want results."""


@contextmanager
def corners(values: dict[str, Callable[[np.ndarray], Any]], grids: list[tuple[int, ...]]) -> Iterator[None]:
    """Run the first and the last programs of a launch on meta tensors, and keep its grid.

    Args:
        values: by the kernel's argument, what it holds at some positions (of elements); others hold zeros.
        grids: is filled.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    memory: list[tuple[str, Tensor]] = []

    def look(pointers: Any, mask: Any) -> tuple[str, Tensor, np.ndarray]:
        """The argument that pointers point into, and their positions in it."""
        enabled = mask.data.astype(bool)
        addresses = np.broadcast_to(pointers.data, enabled.shape)[enabled].astype(np.int64)
        if addresses.size == 0:
            return "", torch.empty(0), addresses
        name, tensor = memory[int(addresses[0] // REGION) - 1]
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        positions = addresses - (int(addresses[0] // REGION) * REGION)
        assert (positions % tensor.element_size() == 0).all()
        positions //= tensor.element_size()
        assert positions.min() >= 0, f"{name} {list(tensor.shape)}: position {positions.min()}"
        assert positions.max() < extent, f"{name} {list(tensor.shape)}: position {positions.max()} of {extent}"
        return name, tensor, positions

    def load(_: Any, pointers: Any, mask: Any, other: Any, *args: Any) -> Any:
        kind = pointers.get_element_ty()
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        found = np.zeros(shape, interpreter._get_np_dtype(kind))
        name, _, positions = look(pointers, mask)
        if name in values:
            found[np.broadcast_to(mask.data.astype(bool), shape)] = values[name](positions)
        return interpreter.TensorHandle(found, kind)

    def store(_: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> None:
        look(pointers, mask)

    def atomic(_: Any, operation: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        return load(_, pointers, mask, None)

    def ends(*bounds: Any) -> list[Any]:
        """The first two turns of a loop and the last one, counted in integers of the bounds' width."""
        is_wide = any(getattr(bound, "dtype", tl.int32) == tl.int64 for bound in bounds)
        turns = range(*(int(bound) for bound in bounds))
        kind, width = (tl.int64, np.int64) if is_wide else (tl.int32, np.int32)
        some = dict.fromkeys([*turns[:2], *turns[-1:]])
        return [tl.tensor(interpreter.TensorHandle(np.array([turn], width), kind), kind) for turn in some]

    def launch(executor: Any, *args: Any, **options: Any) -> None:
        names = inspect.getfullargspec(executor.fn).args
        arguments = dict(zip(names, args, strict=False)) | {name: options[name] for name in names if name in options}
        for name, argument in arguments.items():
            if isinstance(argument, Tensor):
                memory.append((name, argument))
                address = len(memory) * REGION
                stand_in = SimpleNamespace(dtype=argument.dtype, data_ptr=lambda address=address: address)
                arguments[name] = interpreter._implicit_cvt(stand_in)
            elif name not in executor.constexprs:
                arguments[name] = interpreter._implicit_cvt(argument)
        grid = (*executor.grid, 1, 1)[:3]
        grids.append(grid)
        builder.set_grid_dim(*grid)
        scope = interpreter._patch_lang(executor.fn)
        try:
            for index in itertools.product(*((0, size - 1) if size > 1 else (0,) for size in grid)):
                builder.set_grid_idx(*index)
                executor.fn(**arguments)
        finally:
            if scope is not None:  # older versions of Triton leave the language as it is
                scope.restore()
        raise _Launched

    with ExitStack() as stack:
        replaced = {"create_masked_load": load, "create_masked_store": store, "create_atomic_rmw": atomic}
        stack.enter_context(mock.patch.multiple(interpreter.InterpreterBuilder, **replaced))
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", launch))
        # overflows of 32-bit integers are asserted not to happen
        asserting = dataclasses.replace(builder.options, debug=True, sanitize_overflow=True)
        stack.enter_context(mock.patch.object(builder, "options", asserting))
        for module in (max_correlation, max_correlation_backward, topk_kernels):
            stack.enter_context(mock.patch.object(module, "range", ends, create=True))
        stack.enter_context(suppress(_Launched))
        yield


def check_launch(launch: Callable[[], object], **values: Callable[[np.ndarray], Any] | int) -> None:
    """Launch a kernel at its corners; `values` are what the named arguments hold."""
    grids: list[tuple[int, ...]] = []
    functions = {name: value if callable(value) else lambda _, value=value: value for name, value in values.items()}
    with corners(functions, grids):
        launch()
    assert grids, "nothing was launched"
    assert all(size <= most for grid in grids for size, most in zip(grid, AXES, strict=True)), grids


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


N, S, C = 2_000_000, 49, 512  # D = 25,088
MAPS = {  # the class table as it lies in memory
    "channels last": lambda: empty(N, S, C, dtype=torch.bfloat16),
    "channels first": lambda: empty(N, C, S, dtype=torch.bfloat16).mT,
    "classes last": lambda: empty(C, S, N, dtype=torch.bfloat16).permute(2, 1, 0),
}


class Sizes:
    """P probes with K of N classes: `P K 2S` passes 2^31."""

    probes, neighbors = 1024, 30_000

    def __init__(self, layout: str) -> None:
        probes, neighbors = self.probes, self.neighbors
        self.table = MAPS[layout]()
        self.probe = empty(probes, S, C, dtype=torch.bfloat16)
        self.index = empty(probes, neighbors, dtype=torch.int64)
        self.slots = N
        self.inverted = InvertedIndex(
            *(empty(size, dtype=torch.int64) for size in (N, N + 1, probes * neighbors, probes * neighbors))
        )
        self.rnorm = empty(N, S)
        self.pooled = empty(probes, neighbors, 2 * S)
        self.argmax = empty(probes, neighbors, 2 * S, dtype=torch.uint8)
        packed = empty(probes, neighbors, 2, 64, dtype=torch.int64)
        self.matches = max_correlation_backward.Matches(packed, empty(probes, neighbors, 64), empty())
        assert self.pooled.numel() > 2**31
        pairs = probes * neighbors
        self.values: dict[str, Any] = {
            "p_index": N - 1, "p_slots": N - 1, "p_order": probes - 1, "p_classes": N - 1, "p_pairs": pairs - 1,
            "p_offsets": lambda positions: pairs - N + positions, "p_scale": 1,
        }  # fmt: skip


@pytest.fixture(params=MAPS)
def sizes(request: pytest.FixtureRequest) -> Sizes:
    return Sizes(request.param)


@interpreted
def test_forward_and_norms_of_two_million_classes(sizes: Sizes) -> None:
    order = empty(sizes.probes, dtype=torch.int64)
    given = sizes.probe, sizes.table, sizes.index, order, sizes.inverted, sizes.rnorm
    check_launch(lambda: max_correlation._launch_forward(*given, sizes.pooled, sizes.argmax), **sizes.values)
    sums, weight = empty(sizes.probes, sizes.neighbors), empty(2 * S)
    check_launch(lambda: max_correlation._launch_forward(*given, weight=weight, sums=sums), **sizes.values)
    check_launch(lambda: max_correlation.inverse_norms(sizes.table, sizes.inverted), **sizes.values)


@interpreted
def test_gradients_of_two_million_classes(sizes: Sizes) -> None:
    given = sizes.pooled, sizes.pooled, sizes.argmax, sizes.index, S, True
    check_launch(lambda: max_correlation_backward.matches(*given), **sizes.values)
    maps = sizes.matches, sizes.rnorm, sizes.probe, sizes.table
    check_launch(lambda: max_correlation_backward.probe_gradient(*maps, sizes.index, sizes.inverted), **sizes.values)
    for compact in (False, True):
        given = *maps, sizes.inverted, compact
        check_launch(lambda given=given: max_correlation_backward.gallery_gradient(*given), **sizes.values)


@interpreted
def test_preparation_of_two_million_maps(sizes: Sizes) -> None:
    maps, visibility, factors = sizes.table, empty(N, S), empty(N, S, 2)
    check_launch(lambda: prepare_maps.prepare_maps(maps, visibility, torch.float32))
    grad = empty(N, S, C)
    check_launch(lambda: prepare_maps.prepare_maps_backward(grad, maps, visibility, factors, False))


@interpreted
def test_all_pairs_of_a_large_gallery() -> None:
    """Of maps of several blocks: maxima over the blocks before are read back."""
    probe, gallery = empty(3368, 192, 64), empty(15_913, 192, 64)
    pooled, weight = empty(3368, 15_913, 384), empty(384)
    argmax = pooled.to(torch.uint8)
    check_launch(lambda: max_correlation.max_correlation(probe, gallery, None, None, None, True), p_scale=1)
    none = empty(0)
    check_launch(lambda: max_correlation._launch_forward(probe, gallery, None, None, None, none, pooled, argmax))
    over_s, sums = empty(3368, 15_913, 192), empty(3, 3368, 15_913)
    check_launch(
        lambda: max_correlation._launch_forward(
            probe, gallery, None, None, None, none, over_s, weight=weight, sums=sums
        )
    )
    check_launch(lambda: max_correlation_backward.matches(pooled, pooled, argmax, None, 192, False), p_scale=1)
    found = max_correlation_backward.Matches(empty(3368, 15_913, 2, 192, dtype=torch.int64), none, empty())
    given = found, none, probe, gallery, None
    check_launch(lambda: max_correlation_backward.probe_gradient(*given, None), p_scale=1)
    check_launch(lambda: max_correlation_backward.gallery_gradient(*given, False), p_scale=1)


@interpreted
@pytest.mark.parametrize("rows", [N, config.MAX_ROWS])
def test_search_among_two_million_classes(rows: int) -> None:
    """All steps in one round, and the last position in a buffer."""
    dim, capacity, k = S * C, 3000, 256
    table = Chunk(empty(rows, dim, dtype=torch.bfloat16), empty(rows), 0)
    buffer = topk_kernels.CandidateBuffer(rows, capacity, META)
    queries = Chunk(empty(4096, dim, dtype=torch.bfloat16), empty(4096), 0)
    query_buffer = topk_kernels.CandidateBuffer(4096, capacity, META)
    above = {f"p_{side}_thresholds": -(2**63) for side in ("row", "column")}
    counts = {f"p_{side}_counts": capacity - 1 for side in ("row", "column")}

    def largest(*values: Any) -> int:  # of the steps that are planned, none before the first round, all there are
        return 2**31 if values[0] == 0 else max(*values)

    with (
        mock.patch.object(topk_search, "max", largest, create=True),
        mock.patch.object(topk_search, "ROUND_FLOPS", 2**80),
    ):
        for tiling in config.cosine_topk(dim, 2)[:2]:
            best = buffer.candidates[:, :k]
            search = topk_search.TopKSearch(k, capacity, tiling, best, buffer.thresholds, None).search_tiles
            check_launch(lambda search=search: search(table, table, buffer, buffer), **above, **counts)
            check_launch(lambda search=search: search(queries, table, query_buffer, None), **above, **counts)


@interpreted
def test_selection_from_two_million_buffers() -> None:
    buffer = topk_kernels.CandidateBuffer(N, 4000, META)
    buffer.longest = 4000
    counts = buffer.counts.clone()
    check_launch(lambda: buffer.compact(256), p_counts=4000)
    check_launch(lambda: buffer.rollback(256, counts), p_counts=4000)
    check_launch(lambda: topk_kernels.sorted_topk(empty(N, 256, dtype=torch.int64)))


@interpreted
def test_an_offset_beyond_32_bits_is_caught() -> None:
    """The checks above see what they are there to see: an overflow, and an address outside."""
    check_launch(lambda: _strided[(1,)](empty(2**32, dtype=torch.int32), 2**29, 4))
    with pytest.raises(AssertionError, match="overflow"):
        check_launch(lambda: _strided[(1,)](empty(2**33, dtype=torch.int32), 2**30, 4))
    with pytest.raises(AssertionError, match="position 6 of 6"):
        check_launch(lambda: _strided[(1,)](empty(6, dtype=torch.int32), 2, 4))


# --- sizes that are refused


def test_a_table_of_too_many_rows_is_refused() -> None:
    rows = empty(config.MAX_ROWS + 1, 2, dtype=torch.float16)
    with pytest.raises(ValueError, match=rf"embeddings: .*{config.MAX_ROWS}.*\[{config.MAX_ROWS + 1}, 2\]"):
        functional.class_neighbors(rows, 3)
    with pytest.raises(ValueError, match=rf"keys: .*{config.MAX_ROWS}.*\[{config.MAX_ROWS + 1}, 2\]"):
        functional.topk_cosine(rows[:5], rows, 3)


@pytest.mark.parametrize(("locations", "channels"), [(2**20 + 1, 1), (1, 2**20 + 1), (2**16, 2**15)])
def test_maps_beyond_the_axes_of_a_launch_are_refused(locations: int, channels: int) -> None:
    maps = empty(1, locations, channels)
    with pytest.raises(ValueError, match=rf"{config.MAX_MAP_AXIS}.*got {locations} locations and {channels} channels"):
        max_correlation.max_correlation(maps, maps, None, None, None, False)
    with pytest.raises(ValueError, match=rf"got {locations} locations and {channels} channels"):
        max_correlation.pair_sums(maps, maps, None, None, False, empty(2 * locations))
    widest = config.correlation_backward(config.MAX_MAP_AXIS, config.MAX_MAP_AXIS, 4, 4, 0)
    for tiles in (each.tiles for each in widest):
        assert math.ceil(config.MAX_MAP_AXIS / tiles["BR"]) <= AXES[1]
        assert math.ceil(config.MAX_MAP_AXIS / tiles["BC"]) <= AXES[2]


def test_too_many_pairs_for_a_launch_are_refused() -> None:
    probe, gallery = empty(2**20, 1, 1, dtype=torch.float16), empty(2**17, 1, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match=f"{2**20} probes with {2**17} of {2**17} gallery maps"):
        max_correlation.pair_sums(probe, gallery, None, None, False, empty(2))


def test_a_long_list_is_sorted(device: torch.device) -> None:
    """Beyond what the kernel compares with all others: with equals, zeros of both signs as one, and infinities."""
    k = topk_kernels.MAX_KERNEL_LIST + 5
    similarities = torch.randn(2, k, device=device).round(decimals=1)
    similarities[:, :3] = torch.tensor([torch.inf, -torch.inf, -0.0])
    packed = candidates.pack(similarities, torch.arange(k, device=device))
    values, ids = topk_kernels.sorted_topk(packed[:, torch.randperm(k, device=device)])
    expected, order = (similarities + 0.0).sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected)
    assert torch.equal(ids, order)
    assert not values[values == 0].signbit().any()


# --- numbers


SHORT_AND_LONG = (2.5e-5, 6e-5, 1e-3, 1.0, 1e3, 3e4)  # lengths of a location


@pytest.mark.parametrize("channel", ["one", "all"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_probe_gradient_of_gallery_maps_of_any_length(
    dtype: torch.dtype, channel: str, backend: str, device: torch.device
) -> None:
    """1 / norm leaves the range of fp16 at both ends: its products with weights were Inf, and then NaN, or zero."""
    count, channels, locations = len(SHORT_AND_LONG), 8, 6
    lengths = torch.tensor(SHORT_AND_LONG, dtype=torch.float64).view(-1, 1, 1, 1)
    directions = torch.zeros(count, channels, 2, 3, dtype=torch.float64)
    if channel == "one":  # subnormals have few bits: let the direction need none
        directions.scatter_(1, torch.arange(locations).view(1, 1, 2, 3).expand(count, -1, -1, -1), 1.0)
    else:
        directions = torch.randint(0, 2, directions.shape).double() * 2 - 1
        lengths = lengths * (1 if dtype == torch.bfloat16 else 4)
        lengths = lengths.clamp(max=6e4)
    gallery = (F.normalize(directions, dim=1) * lengths).to(device, dtype)
    probe = F.normalize(torch.randn(count, channels, 2, 3), dim=1).to(device, dtype)
    index = torch.arange(count, device=device).unsqueeze(1)  # one map each: no gradient hides behind another's
    true_probe, true_gallery = probe.double().requires_grad_(), gallery.double().requires_grad_()
    expected = reference.max_correlation(
        reference.locations(true_probe), reference.locations(true_gallery), index, True
    )
    upstream = torch.randn(expected.shape, device=device) * 10.0 ** -torch.arange(count, device=device).view(-1, 1, 1)
    expected.backward(upstream.double())
    probe.requires_grad_(), gallery.requires_grad_()
    pooled = ops.max_correlation(probe, gallery, index, None, True, False)[0]
    assert (pooled - expected).abs().max() < TOLERANCES[dtype].value
    to_probe, to_gallery = torch.autograd.grad(pooled, (probe, gallery), upstream.to(pooled.dtype))
    assert to_probe.isfinite().all()
    largest = torch.finfo(torch.float16).max / 4
    for row in range(count):
        got, wanted = to_probe[row].double(), true_probe.grad[row]
        assert cosine_between(got, wanted) > 0.99, SHORT_AND_LONG[row]
        if 1e-3 < true_gallery.grad[row].abs().max() < largest:
            assert cosine_between(to_gallery[row].double(), true_gallery.grad[row]) > 0.99, SHORT_AND_LONG[row]
    assert_gradients(to_probe, true_probe.grad, dtype)


@pytest.mark.parametrize("size", [1, 40])
def test_zeros_of_either_sign_fall_by_rising_id(size: int, backend: str, device: torch.device) -> None:
    """A negative product that underflows is zero, and no less than another zero."""
    queries = torch.tensor([[1e18, 0.0]], device=device).repeat(size, 1)
    keys = torch.tensor([[-1e-30, 1e18], [0.0, 1e18]], device=device).repeat(20, 1)
    values, indices = functional.topk_cosine(queries, keys, 6)
    assert indices.tolist() == [[*range(6)]] * size
    assert values.eq(0).all()


@interpreted
def test_sortable_orders_floats_as_integers() -> None:
    falling = [torch.inf, 3e38, 1.0, 1e-38, 1e-45, 0.0, -0.0, -1e-45, -1e-38, -1.0, -3e38, -torch.inf]
    values = torch.tensor([*falling, torch.nan, -torch.nan, 0.0, 0.0])
    keys, back = torch.empty(16, dtype=torch.int32), torch.empty(16)
    _to_keys_and_back[(1,)](values, keys, back)
    wanted = keys[:12].tolist()
    assert sorted(wanted, reverse=True) == wanted
    assert len(set(wanted)) == 11, "the two zeros are one"
    assert keys[12:14].tolist() == [2**31 - 1] * 2
    assert min(wanted) > -(2**31), "nothing real is as low as padding"
    torch.testing.assert_close(back, values + 0.0, rtol=0, atol=0, equal_nan=True)
    assert not back[5:7].signbit().any()
    assert torch.equal(candidates.sortable(values), keys)
    torch.testing.assert_close(candidates.unsortable(keys), back, rtol=0, atol=0, equal_nan=True)
