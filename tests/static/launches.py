"""Every kernel launch at the shapes that the library is tuned for, recorded on meta tensors and compiled for any GPU.

The launchers themselves decide what is compiled: they run with their kernels replaced by a recorder, so that every
signature and tile size is the one that a user's call would have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from qaconv_triton.common.chunks import Chunk
from qaconv_triton.common.inverted_index import inverted_index
from qaconv_triton.kernels import (
    config,
    max_correlation,
    max_correlation_backward,
    norms,
    prepare_maps,
    topk_kernels,
    topk_search,
    tuning,
)

TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 86, 89, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
MAIN = ("C=512 S=49 bf16", "C=512 S=49 fp32", "class graph D=512 bf16", "class graph D=25088 bf16")
TILES = ("B", "BS", "BR", "BC", "BM", "BN", "BD", "GROUP", "BL", "BK")
CHANNELS = 512
META = torch.device("meta")


@dataclass(frozen=True)
class Case:
    """A launch to compile: what a user's call would do, at sizes that fix the shape class."""

    name: str
    module: ModuleType
    launch: Callable[[], object]
    launches_before: int = 0  # of the same kernel

    @property
    def is_main(self) -> bool:
        """Whether the library is tuned for this shape above all."""
        return self.name.endswith(MAIN)


def cases(batch: int = 256, neighbors: int = 256, classes: int = 10_572) -> Iterator[Case]:
    """Every kernel in half precision and fp32.

    Args:
        batch: feature maps in a batch, P.
        neighbors: of a map or of a class, K; or maps that a batch is matched with.
        classes: in the class table, G or N.
    """
    half, single, fp16 = torch.bfloat16, torch.float32, torch.float16
    for dtype, table_dtype in ((half, half), (single, single), (half, single), (fp16, single)):
        for locations in (49, 192):
            yield from _score_cases(batch, neighbors, classes, locations, dtype, table_dtype)
    # the probe gradient has code of its own for a table in fp16
    (own,) = (
        each for each in _score_cases(batch, neighbors, classes, 49, fp16, fp16) if each.name[:14] == "probe gradient"
    )
    yield own
    for dtype, out_dtype in ((half, half), (single, single), (single, half)):
        yield from _preparation_cases(batch, dtype, out_dtype)
    yield from _graph_cases(neighbors, classes)


def _score_cases(
    batch: int, neighbors: int, classes: int, locations: int, dtype: torch.dtype, table_dtype: torch.dtype
) -> Iterator[Case]:
    """Scores and gradients of maps in `dtype`, over a class table in `table_dtype`: fp32 under autocast."""
    shape = f"C={CHANNELS} S={locations} {TYPES[dtype]}" + ("" if dtype == table_dtype else f" on {TYPES[table_dtype]}")
    empty = partial(torch.empty, device=META)
    probe, gallery = (empty(count, locations, CHANNELS, dtype=dtype) for count in (batch, neighbors))
    table = empty(classes, locations, CHANNELS, dtype=table_dtype)
    index, group = empty(batch, neighbors, dtype=torch.int64), empty(batch, dtype=torch.int64)
    pooled, sums = empty(batch, neighbors, 2 * locations), empty(batch, neighbors)
    argmax, weight = pooled.to(torch.uint8), empty(2 * locations)
    inverted = inverted_index(index, classes)
    rnorm, none = empty(len(inverted.classes), locations), empty(0)
    width = 64 * triton.cdiv(locations, 64)
    packed = empty(batch, neighbors, 2, width, dtype=torch.int64)
    found = max_correlation_backward.Matches(packed, empty(batch, neighbors, width), empty(()))
    of_classes = (found, rnorm, probe, table)
    of_pairs = (found, none, probe, gallery)  # prepared maps: no norms
    scored = (probe, table, index, group, inverted, rnorm)

    def case(name: str, function: Callable[..., object], *args: object, before: int = 0, **options: object) -> Case:
        module = max_correlation_backward if "gradient" in name else max_correlation
        return Case(f"{name} {shape}", module, partial(function, *args, **options), before)

    forward = (max_correlation._launch_forward, *scored)
    probe_gradient = (max_correlation_backward.probe_gradient, *of_classes, index, inverted)
    gallery_gradient = (max_correlation_backward.gallery_gradient, *of_classes, inverted)
    if locations == 49 and dtype == table_dtype:
        yield case("all pairs probe gradient", probe_gradient[0], *of_pairs, None, None)
        yield case("all pairs gallery gradient", gallery_gradient[0], *of_pairs, None, compact=False)
    if locations == 49 and dtype != torch.float16:
        yield case("class path scores alone", *forward, weight=weight, sums=sums)
        # a table with sparse gradients lies channels first: no descriptor takes it
        first = empty(classes, CHANNELS, locations, dtype=table_dtype).mT
        yield case("sparse gallery gradient", gallery_gradient[0], found, rnorm, probe, first, inverted, compact=True)
        yield case(
            "probe gradient of a table channels first,", probe_gradient[0], found, rnorm, probe, first, index, inverted
        )
    if locations == 49 and dtype != torch.float16 and table_dtype == torch.float32:  # norms out of range
        yield case("class path forward, normalised first,", *forward, pooled, argmax, before=1)
        yield case("probe gradient, normalised first,", *probe_gradient, before=1)
    yield Case(f"norms {shape}", norms, partial(norms.inverse_norms, table, inverted))
    yield case("class path forward", *forward, pooled, argmax)
    if dtype == table_dtype:
        yield case("all pairs forward", max_correlation.max_correlation, probe, gallery, None, None, None, False)
        yield case("all pairs match", max_correlation.pair_sums, probe, gallery, None, None, False, weight)
    if dtype == table_dtype == torch.bfloat16:  # the same for other dtypes
        matches = (max_correlation_backward.matches, pooled, pooled, argmax, index, locations)
        yield case("matches of gradients", *matches, has_radial=True)
    yield case("probe gradient", *probe_gradient)
    yield case("gallery gradient", *gallery_gradient, compact=False)


def _preparation_cases(batch: int, dtype: torch.dtype, out_dtype: torch.dtype) -> Iterator[Case]:
    """Maps as they are matched, weighted by visibility and not, and the gradient of that."""
    shape = f"C={CHANNELS} S=49 {TYPES[dtype]}" + ("" if dtype == out_dtype else f" to {TYPES[out_dtype]}")
    empty = partial(torch.empty, device=META)
    maps, grad = (empty(batch, 49, CHANNELS, dtype=each) for each in (dtype, out_dtype))
    factors, visibility = empty(batch, 49, 2), empty(batch, 49)
    for name, weights in (("", None), (" with visibility", visibility)):
        is_unit = weights is None and dtype == out_dtype == torch.float32
        forward = partial(prepare_maps.prepare_maps, maps, weights, out_dtype)
        backward = partial(prepare_maps.prepare_maps_backward, grad, maps, weights, factors, is_unit)
        yield Case(f"preparation{name} {shape}", prepare_maps, forward)
        yield Case(f"preparation's gradient{name} {shape}", prepare_maps, backward)


def _graph_cases(neighbors: int, classes: int) -> Iterator[Case]:
    """The class graph, the search in other keys, and what selects from and sorts their candidates."""
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (512, 25_088):
            rows = torch.empty(classes, dim, dtype=dtype, device=META)
            chunk = Chunk(rows, torch.empty(classes, device=META), 0)
            for name, is_self in (("class graph", True), ("gallery search", False)):
                search = partial(_search, chunk, neighbors, is_self)
                yield Case(f"{name} D={dim} {TYPES[dtype]}", topk_search, search)
    for length in (512, 4096):
        buffer = topk_kernels.CandidateBuffer(classes, length, META)
        buffer.longest = length
        rollback = partial(buffer.rollback, neighbors, buffer.counts.clone())
        yield Case(f"compaction of {length}", topk_kernels, partial(buffer.compact, neighbors))
        yield Case(f"rollback of {length}", topk_kernels, rollback)
    for k in (20, 256):
        candidates = torch.empty(classes, k, dtype=torch.int64, device=META)
        yield Case(f"sort of K={k}", topk_kernels, partial(topk_kernels.sorted_topk, candidates))


def _search(chunk: Chunk, k: int, is_self: bool) -> None:
    capacity = 4 * k
    buffer = topk_kernels.CandidateBuffer(len(chunk.rows), capacity, META)

    def run(tiling: config.Config) -> object:
        search = topk_search.TopKSearch(k, capacity, tiling, buffer.candidates[:, :k], buffer.thresholds, None)
        return search.search_tiles(chunk, chunk, buffer, buffer if is_self else None)

    shape = chunk.rows.shape[1], chunk.rows.element_size()
    run(tuning.select_config(config.cosine_topk, shape, "", 0.0, run))


class _Recorded(Exception):
    """Ends a launcher where its kernel would run: from there on it may want results."""


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch, the first one after `launches_before`."""

    def __init__(self, kernel: Any, launches_before: int = 0) -> None:
        self.kernel = kernel
        self.launches_before = launches_before
        self.arguments: dict[str, Any] | None = None
        self.options: dict[str, int] = {}
        self.constants: dict[str, Any] = {}

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, num_stages: int, **constants: Any) -> None:
            if self.launches_before:
                self.launches_before -= 1
                return
            self.arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            self.constants = constants
            self.options = {"num_warps": num_warps, "num_stages": num_stages}
            raise _Recorded

        return launch

    @property
    def configuration(self) -> str:
        """Tiles, warps and stages."""
        tiles = [f"{name}={int(self.constants[name])}" for name in TILES if name in self.constants]
        return " ".join([*tiles, *(f"{name[4:]}={value}" for name, value in self.options.items())])


def record(case: Case, number: int = 0) -> tuple[Recorder, int]:
    """Run a case's launcher on meta tensors.

    Args:
        case: to run.
        number: of the configuration, among those that config.py lists; the first is the default.

    Returns:
        The kernel with its arguments, and how many configurations there are.
    """
    kernels = {name: value for name, value in vars(case.module).items() if isinstance(value, triton.JITFunction)}
    recorders = {name: Recorder(kernel, case.launches_before) for name, kernel in kernels.items()}
    count = 1

    def select_config(configs: tuning.ListConfigs, shape: tuple[int, ...], *_: object) -> config.Config:
        nonlocal count
        found = configs(*shape)
        count = len(found)
        return found[number]

    with (
        mock.patch.object(tuning, "select_config", select_config),
        mock.patch.multiple(case.module, **recorders),
        suppress(_Recorded),
    ):
        case.launch()
    (recorder,) = (each for each in recorders.values() if each.arguments is not None)
    return recorder, count


def specialised(recorder: Recorder) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Signature, constants and attributes of a recorded launch: what the runtime would specialise a kernel on."""
    assert recorder.arguments is not None
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(recorder.kernel.arg_names):
        value = recorder.arguments[name]
        is_special = not recorder.kernel.params[position].do_not_specialize
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in recorder.constants or value is None or (value == 1 and is_special):
            signature[name] = "constexpr"
            constants[(position,)] = value
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and is_special:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def parameters(recorder: Recorder) -> list[str]:
    """The argument of every parameter of the compiled kernel: a descriptor comes with its sizes and strides."""
    found = []
    for name, kind in specialised(recorder)[0].items():
        value = (recorder.arguments or {})[name]
        count = 1 + 2 * len(value.shape) if isinstance(value, TensorDescriptor) else 1
        found += [name] * (count if kind != "constexpr" else 0)
    return found


def compile_key(recorder: Recorder) -> str:
    """Everything that a compiled kernel depends on: launches of one key share it."""
    parts = (sorted((str(name), str(value)) for name, value in part.items()) for part in specialised(recorder))
    return json.dumps([recorder.kernel.__name__, *parts, recorder.options])


def generation_of(arch: str) -> int:
    """As config.py numbers it: 90 or 942."""
    return int(arch.removeprefix("sm_").removeprefix("gfx"))


def compile_for(recorder: Recorder, arch: str) -> Any:
    """Compile a recorded launch as the runtime would."""
    source = ASTSource(recorder.kernel, *specialised(recorder))
    return triton.compile(source, target=TARGETS[arch], options=recorder.options)
