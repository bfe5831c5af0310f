"""The class-neighbour graph against what one would use in its place.

    python -m bench graph --cases 4096x25088x32

Useful work is every unordered pair of classes once, N (N - 1) D multiplications and additions, for every provider:
one that multiplies both halves of the similarity does twice that, and is credited with once. Useful bytes are the table
read once, and similarities and ids written once.
"""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qaconv_triton import functional
from qaconv_triton.kernels import config

from . import measure
from .table import Row

OURS = "qaconv_triton"
SAMPLE = 256  # rows whose neighbours are checked
ROWS = 1024  # of a block in "blocked mm + topk"
STRIP_BYTES = 2**30  # of similarities at a time on CUDA
FACTORS, GROUP = 128, 40  # of the made-up tables: dimensions that matter, classes that resemble each other
STEP = 0.05  # how far an epoch moves a class, of its length
TF32 = 2.0**-9  # error of a cosine whose operands, of length one, are cut to tf32

Graph = tuple[Tensor | None, Tensor]  # similarities [N, k], where a provider has them, and ids [N, k]


class Case(NamedTuple):
    """A size to measure; `only` names the providers where not all of them are of interest."""

    classes: int
    dim: int
    k: int
    dtype: torch.dtype = torch.float32
    repeats: int = 5
    only: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the case is called on the command line and in the results."""
        return f"{self.classes}x{self.dim}x{self.k}"


SWEPT = (OURS, "faiss flat", "blocked mm + topk")  # at sizes that are there for their course, not for themselves
TINY = Case(600, 64, 9, repeats=3)
CPU_CASES = (
    Case(4096, 25088, 32),
    Case(8000, 4096, 128),
    Case(20000, 512, 256),
    Case(60000, 512, 64, repeats=3, only=(OURS, "faiss flat")),
    *(Case(classes, 512, 64, repeats=3, only=SWEPT) for classes in (2500, 5000, 10000, 20000, 40000)),
    *(Case(10000, 512, k, repeats=3, only=SWEPT) for k in (16, 256)),  # 64 is above
)
CUDA_SIZES = ((10572, 25088, 256), (85742, 25088, 256), (85742, 512, 256), (20000, 512, 256))
CUDA_SWEEP = ((10572, 512, 256), (42871, 512, 256))  # in bf16, with the last two sizes


def cases(device: torch.device) -> list[Case]:
    """The cases of a device: on CUDA each size in bf16 and fp32, those between them in bf16."""
    if device.type != "cuda":
        return list(CPU_CASES)
    both = [Case(*size, dtype=dtype) for size in CUDA_SIZES for dtype in (torch.bfloat16, torch.float32)]
    found = both + [Case(*size, dtype=torch.bfloat16, repeats=3) for size in CUDA_SWEEP]
    return sorted(found, key=lambda case: work(case)[0] * case.dtype.itemsize)  # a run cut short loses the largest


def table(case: Case, device: torch.device) -> Tensor:
    """A class table `[N, D]` that resembles a trained one more than noise does; the same for the same case and device.

    Groups of classes about common centres, in any order, within a subspace of 128 dimensions, some noise beyond it, and
    lengths that differ by a factor of a few.
    """
    generator = torch.Generator(device).manual_seed(case.classes + case.dim)
    draw = partial(torch.randn, generator=generator, device=device)
    groups = max(case.classes // GROUP, 2)
    member = torch.randint(groups, (case.classes,), generator=generator, device=device)
    latent = draw(groups, FACTORS)[member] + 0.7 * draw(case.classes, FACTORS)
    basis = draw(FACTORS, case.dim) / FACTORS**0.5
    lengths = (0.4 * draw(case.classes, 1)).exp()
    values = torch.empty(case.classes, case.dim, dtype=case.dtype, device=device)
    for start in range(0, case.classes, 4096):
        part = slice(start, start + 4096)
        clean = latent[part] @ basis
        values[part] = lengths[part] * (clean + 0.2 * draw(clean.shape))
    return values


def _stepped(values: Tensor) -> Tensor:
    """The table an epoch earlier: every class a small step away."""
    generator = torch.Generator(values.device).manual_seed(0)
    earlier = values.clone()
    for start in range(0, len(values), 4096):
        rows = earlier[start : start + 4096].float()
        noise = torch.randn(rows.shape, generator=generator, device=values.device)
        step = STEP * rows.norm(dim=1, keepdim=True) / values.shape[1] ** 0.5
        earlier[start : start + 4096] = rows + step * noise
    return earlier


class Truth(NamedTuple):
    """Neighbours in fp64 of some rows `[R]`: all similarities `[R, N]`, -Inf to itself, and the k best `[R, k]`."""

    rows: Tensor
    similarities: Tensor
    values: Tensor
    ids: Tensor


def truth(case: Case, values: Tensor) -> Truth:
    """The true neighbours of a sample of classes, a block of classes at a time."""
    rows = torch.randperm(case.classes, generator=torch.Generator().manual_seed(1))[:SAMPLE].sort().values
    rows = rows.to(values.device)
    sample = normalize(values[rows].double())
    similarities = sample.new_empty(len(rows), case.classes)
    step = max(1, 2**24 // case.dim)
    for start in range(0, case.classes, step):
        similarities[:, start : start + step] = sample @ normalize(values[start : start + step].double()).mT
    similarities[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
    return Truth(rows, similarities, *similarities.topk(case.k))


def check(case: Case, true: Truth, choice: float, value: float, graph: Graph) -> measure.Verdict:
    """Compare a graph with the truth.

    Args:
        case: whose graph it is.
        true: the truth about a sample of its rows.
        choice: error that the similarities by which neighbours were chosen may have: the r-th of a list must be as
            similar as the true r-th to within twice that, so it is the true one where no other is as close.
        value: error that the returned similarities may have.
        graph: the result. Without similarities it claims a set of neighbours, not their order.
    """
    similarities, ids = graph
    if ids.shape != (case.classes, case.k):
        return measure.Verdict(f"ids {list(ids.shape)} instead of {[case.classes, case.k]}")
    if ids.min() < 0 or ids.max() >= case.classes:
        return measure.Verdict(f"ids outside [0, {case.classes})")
    if (ids == torch.arange(case.classes, device=ids.device).unsqueeze(1)).any():
        return measure.Verdict("a class is its own neighbour")
    if (ids.sort(dim=1).values.diff(dim=1) == 0).any():
        return measure.Verdict("a neighbour twice in a list")
    chosen = ids[true.rows]
    is_chosen = torch.zeros_like(true.similarities, dtype=torch.bool).scatter_(1, chosen, True)
    recall = is_chosen.gather(1, true.ids).double().mean().item()
    found = true.similarities.gather(1, chosen)
    if similarities is not None:
        error = (similarities[true.rows].double() - found).abs().max().item()
        if not error <= value:  # NaN is wrong, too
            return measure.Verdict(f"similarities are off by {error:.2g}, more than {value:.2g}", recall)
    else:
        found = found.sort(dim=1, descending=True).values
    error = (true.values - found).abs().max().item()
    if not error <= 2 * choice:
        return measure.Verdict(f"neighbours that are {error:.2g} less similar, more than {2 * choice:.2g}", recall)
    return measure.Verdict("", recall)


def rounding(dtype: torch.dtype, dim: int) -> float:
    """Largest error of a cosine whose operands, of length one, are rounded to `dtype`, with sums and result in it too.

    Half precision is summed in fp32. Of an fp32 sum on tensor cores every 16th partial sum may be cut off.
    """
    if dtype == torch.float32:
        return max(1e-5, dim * 2.0**-28)
    return {torch.float64: 1e-10, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-7}[dtype]


class Method(NamedTuple):
    """How a provider is made: `make(case, values)` prepares what is not timed and returns what is."""

    make: Callable[[Case, Tensor], Callable[[], Graph]]
    choice: float
    value: float
    note: str = ""
    products: torch.dtype | None = None


def methods(case: Case, device: torch.device) -> dict[str, Method]:
    """All there is for a case on a device, by name."""
    on_cuda = device.type == "cuda"
    single = rounding(torch.float32, case.dim)
    if on_cuda and config.precision() == "tf32":  # torch's setting, for torch.mm as for ours
        single = TF32
    exact = rounding(torch.float64, case.dim) if case.dtype == torch.float64 else single
    rounded = exact if case.dtype in (torch.float32, torch.float64) else rounding(case.dtype, case.dim)
    wide = torch.float32 if case.dtype.itemsize == 2 and not on_cuda else None  # the CPU widens half precision first
    moved = f"from the graph of a table a step of {STEP:.0%} away, made outside the time"
    found = {
        OURS: Method(_ours, exact, exact, products=wide),
        f"{OURS} warm": Method(_warm, exact, exact, moved, wide),
    }
    if not on_cuda:
        if importlib.util.find_spec("faiss"):
            found["faiss flat"] = Method(_faiss, single, single, products=torch.float32)
        found["blocked mm + topk"] = Method(partial(_strips, rows=ROWS), rounded, rounded)
        return found
    if case.dtype == torch.float32:
        half = rounding(torch.bfloat16, case.dim)
        found[f"{OURS} bf16"] = Method(_bf16, half, half, products=torch.bfloat16)
        found[f"{OURS} bf16 + rescore"] = Method(_rescored, half, single, products=torch.bfloat16)
    strip = max(1, STRIP_BYTES // (case.classes * case.dtype.itemsize))
    found["cuBLAS strips + topk"] = Method(partial(_strips, rows=strip), rounded, rounded)
    if case.dtype.itemsize == 2:
        strip = max(1, STRIP_BYTES // (case.classes * 4))
        found["cuBLAS strips to fp32 + topk"] = Method(partial(_wide_strips, rows=strip), exact, exact)
    if importlib.util.find_spec("faiss") and hasattr(importlib.import_module("faiss"), "StandardGpuResources"):
        found["faiss gpu"] = Method(_faiss_gpu, single, single, "its memory is not torch's", torch.float32)
    if importlib.util.find_spec("flashlib"):
        note = "products in tf32" if case.dtype == torch.float32 else ""
        found["flashlib knn"] = Method(_flashlib, max(rounded, TF32), TF32, note)
    return found


def providers(case: Case, values: Tensor, wanted: tuple[str, ...] = ()) -> Iterator[measure.Provider]:
    """The providers of a case, made one after the other; `wanted`: those with one of these in their names."""
    true = truth(case, values)
    for name, method in methods(case, values.device).items():
        if (case.only and name not in case.only) or (wanted and not any(part in name for part in wanted)):
            continue
        function = measure.attempt(partial(method.make, case, values))
        peak: Callable[[], int | None] | None = partial(measure.resident_peak, partial(_calls, case, name))
        if values.is_cuda:
            peak = None if name == "faiss gpu" else partial(measure.device_peak, function, values.device)
        checked = partial(check, case, true, method.choice, method.value)
        yield measure.Provider(name, function, checked, method.note, method.products, peak)


def _calls(case: Case, name: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A small call and that of the case, for the process in which memory is measured."""
    device = torch.device("cpu")
    small, call = (
        methods(size, device)[name].make(size, table(size, device)) for size in (TINY._replace(dtype=case.dtype), case)
    )
    return small, call


def _ours(case: Case, values: Tensor) -> Callable[[], Graph]:
    return lambda: functional.class_neighbors(values, case.k, return_similarities=True)


def _warm(case: Case, values: Tensor) -> Callable[[], Graph]:
    previous = functional.class_neighbors(_stepped(values), case.k)
    return lambda: functional.class_neighbors(values, case.k, return_similarities=True, previous=previous)


def _bf16(case: Case, values: Tensor) -> Callable[[], Graph]:
    return lambda: functional.class_neighbors(values, case.k, return_similarities=True, dtype=torch.bfloat16)


def _rescored(case: Case, values: Tensor) -> Callable[[], Graph]:
    return lambda: functional.class_neighbors(
        values, case.k, return_similarities=True, dtype=torch.bfloat16, rescore=True
    )


def _strips(case: Case, values: Tensor, rows: int) -> Callable[[], Graph]:
    """Normalise once, multiply a strip of rows with all, leave out each row itself, select."""

    def call() -> Graph:
        unit = normalize(values.float() if values.dtype.itemsize == 2 else values).to(values.dtype)
        return _selected(case, rows, lambda part: torch.mm(unit[part], unit.mT))

    return call


def _wide_strips(case: Case, values: Tensor, rows: int) -> Callable[[], Graph]:
    """As `_strips`, but nothing is rounded to half precision: raw products come out in fp32 and are scaled after."""

    def call() -> Graph:
        rnorm = 1 / torch.linalg.vector_norm(values, dim=1, dtype=torch.float32).clamp_min(1e-12)

        def strip(part: slice) -> Tensor:
            products = torch.mm(values[part], values.mT, out_dtype=torch.float32)
            return products.mul_(rnorm).mul_(rnorm[part, None])

        return _selected(case, rows, strip)

    return call


def _selected(case: Case, rows: int, strip: Callable[[slice], Tensor]) -> Graph:
    found = []
    for start in range(0, case.classes, rows):
        similarities = strip(slice(start, start + rows))
        similarities.diagonal(start).fill_(-torch.inf)
        found.append(similarities.topk(case.k))
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _faiss(case: Case, values: Tensor) -> Callable[[], Graph]:
    """Normalisation and the index's copy are part of the time, as they would be in every epoch."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())

    def call() -> Graph:
        unit = normalize(values.float()).numpy()
        index = faiss.IndexFlatIP(case.dim)
        index.add(unit)
        similarities, ids = index.search(unit, case.k + 1)
        return _without_self(torch.from_numpy(similarities), torch.from_numpy(ids))

    return call


def _faiss_gpu(case: Case, values: Tensor) -> Callable[[], Graph]:
    import faiss
    import faiss.contrib.torch_utils  # lets an index take tensors

    resources = faiss.StandardGpuResources()
    resources.setDefaultNullStreamAllDevices()  # torch's stream: events see it

    def call() -> Graph:
        unit = normalize(values.float())
        index = faiss.GpuIndexFlatIP(resources, case.dim)
        index.add(unit)
        return _without_self(*index.search(unit, case.k + 1))

    return call


def _flashlib(case: Case, values: Tensor) -> Callable[[], Graph]:
    """By squared distance of normalised rows, which orders them as the cosine does."""
    from flashlib import flash_knn

    def call() -> Graph:
        unit = normalize(values.float()).to(values.dtype)
        ids = flash_knn(unit, unit, case.k + 1, return_distances=False).long()
        return None, _without_self(None, ids)[1]

    return call


def _without_self(similarities: Tensor | None, ids: Tensor) -> Graph:
    """Drop each row's own id from `[N, k + 1]`, or the last of the list where a class is not in its own."""
    keep = ids != torch.arange(len(ids), device=ids.device).unsqueeze(1)
    keep[:, -1] &= ~keep.all(1)
    shape = (len(ids), ids.shape[1] - 1)
    return None if similarities is None else similarities[keep].view(shape), ids[keep].view(shape)


def run(arguments: Namespace) -> Iterator[list[Row]]:
    """Measure what the command line asks for, and hand out the rows of one case at a time."""
    device = torch.device(arguments.device)
    for case in _chosen(arguments, device):
        yield _measured(case, device, arguments)


def _chosen(arguments: Namespace, device: torch.device) -> list[Case]:
    known = [TINY] if arguments.tiny else cases(device)
    if arguments.cases:
        known = [case for name in arguments.cases for case in _named(name, known)]
    if arguments.dtype:
        known = list(dict.fromkeys(case._replace(dtype=getattr(torch, arguments.dtype)) for case in known))
    return known


def _named(name: str, known: list[Case]) -> list[Case]:
    """The known cases of that name, or a new one."""
    sizes = [int(size) for size in name.split("x")]
    if len(sizes) != 3 or not 0 < sizes[2] < sizes[0] or sizes[1] < 1:
        raise ValueError(f"graph: expected a case NxDxK of N classes, D numbers each, K < N neighbours, got {name!r}")
    return [case for case in known if case.name == name] or [Case(sizes[0], sizes[1], sizes[2])]


def work(case: Case) -> tuple[float, float]:
    """Useful operations, every unordered pair once, and useful bytes: the table, similarities in fp32 at least, ids."""
    width = case.dtype.itemsize
    flops = float(case.classes) * (case.classes - 1) * case.dim
    return flops, float(case.classes) * (case.dim * width + case.k * (max(width, 4) + 8))


def _measured(case: Case, device: torch.device, arguments: Namespace) -> list[Row]:
    values, (flops, moved) = table(case, device), work(case)
    return measure.rows(
        "graph",
        case.name,
        case.dtype,
        list(providers(case, values, tuple(arguments.providers or ()))),
        base=OURS,
        repeats=arguments.repeats or case.repeats,
        device=device,
        flops=flops,
        moved=moved,
        memory=arguments.memory,
    )
