"""Benchmarks of the class graph, beside what one would use in its place.

    python -m bench graph --cases 4096x25088x32

Useful FLOPs are every unordered pair of classes once, N (N - 1) D, for every provider: one that multiplies both halves
of the similarity matrix does twice that. Useful bytes are the table read once, similarities and ids written once.
"""

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qaconv_triton import functional
from qaconv_triton.kernels import config

from . import measure
from .cases import OURS, Case

SAMPLE = 256  # rows whose neighbours are checked
STRIP_ROWS = 1024  # of similarities at a time on the CPU
STRIP_BYTES = 2**30  # of similarities at a time on CUDA
LATENT_DIM, GROUP_CLASSES = 128, 40  # of the synthetic table
EPOCH_STEP = 0.05  # how far an epoch moves a class, relative to its norm
TF32_ERROR = 2.0**-9  # of a cosine of unit vectors that are rounded to tf32

Graph = tuple[Tensor | None, Tensor]  # similarities [N, K], if a provider returns them, and ids [N, K]


_Graph = partial(Case, "graph")
_Sweep = partial(_Graph, repeats=3, only=(OURS, "faiss flat", "blocked mm + topk"))
TINY = [_Graph((600, 64, 9), repeats=3)]
CPU_CASES = [
    *(_Graph(sizes) for sizes in ((4096, 25088, 32), (8000, 4096, 128), (20000, 512, 256))),
    _Graph((60000, 512, 64), repeats=3, only=(OURS, "faiss flat")),
    *(_Sweep((classes, 512, 64)) for classes in (2500, 5000, 10000, 20000, 40000)),
    *(_Sweep((10000, 512, k)) for k in (16, 256)),
]
CUDA_SIZES = ((10572, 25088, 256), (85742, 25088, 256), (85742, 512, 256), (20000, 512, 256))
CUDA_CASES = [
    *(_Graph(sizes, dtype=dtype) for dtype in (torch.bfloat16, torch.float32) for sizes in CUDA_SIZES[::-1]),
    *(_Graph((classes, 512, 256), dtype=torch.bfloat16, repeats=3) for classes in (10572, 42871)),
]


def build(case: Case, device: torch.device) -> Tensor:
    """A class table `[N, D]` like a trained one, the same for the same case and device.

    Groups of similar classes in random order, in a subspace of 128 dimensions plus noise, with norms that differ by a
    factor of a few.
    """
    classes, dim, _ = case.sizes
    generator = torch.Generator(device).manual_seed(classes + dim)
    draw = partial(torch.randn, generator=generator, device=device)
    groups = max(classes // GROUP_CLASSES, 2)
    member = torch.randint(groups, (classes,), generator=generator, device=device)
    latent = draw(groups, LATENT_DIM)[member] + 0.7 * draw(classes, LATENT_DIM)
    basis = draw(LATENT_DIM, dim) / LATENT_DIM**0.5
    norms = (0.4 * draw(classes, 1)).exp()
    table = torch.empty(classes, dim, dtype=case.dtype, device=device)
    for rows, of_latent, of_norms in zip(table.split(4096), latent.split(4096), norms.split(4096), strict=True):
        clean = of_latent @ basis
        rows.copy_(of_norms * (clean + 0.2 * draw(clean.shape)))
    return table


def table_of_previous_epoch(table: Tensor) -> Tensor:
    """The table with every class moved by a small step."""
    generator = torch.Generator(table.device).manual_seed(0)
    previous = table.clone()
    for rows in previous.split(4096):
        noise = torch.randn(rows.shape, generator=generator, device=table.device)
        step = EPOCH_STEP * rows.float().norm(dim=1, keepdim=True) / table.shape[1] ** 0.5
        rows.copy_(rows.float() + step * noise)
    return previous


class Expected(NamedTuple):
    """Neighbours in fp64 of the classes `rows [R]`: similarities `[R, N]`, -Inf to itself, and the K best `[R, K]`."""

    rows: Tensor
    similarities: Tensor
    values: Tensor
    ids: Tensor


def expected_neighbors(table: Tensor, k: int) -> Expected:
    """The neighbours of a sample of classes in fp64, a block of classes at a time."""
    rows = torch.randperm(len(table), generator=torch.Generator().manual_seed(1))[:SAMPLE].sort().values
    rows = rows.to(table.device)
    sample = normalize(table[rows].double())
    blocks = table.split(max(1, 2**24 // table.shape[1]))
    similarities = torch.cat([sample @ normalize(block.double()).mT for block in blocks], dim=1)
    similarities.scatter_(1, rows.unsqueeze(1), -torch.inf)
    return Expected(rows, similarities, *similarities.topk(k))


def check(expected: Expected, ranking_error: float, value_error: float, graph: Graph) -> float:
    """Compare a graph with the expected neighbours of a sample of its rows and return the recall.

    Args:
        expected: the neighbours.
        ranking_error: of the similarities by which neighbours were selected: the r-th of a list must be as similar as
            the expected r-th to within twice that.
        value_error: of the returned similarities.
        graph: the result; without similarities it is a set of neighbours.

    Raises:
        AssertionError: the graph is wrong.
    """
    similarities, ids = graph
    shape = [expected.similarities.shape[1], expected.ids.shape[1]]
    assert list(ids.shape) == shape, f"ids {list(ids.shape)} instead of {shape}"
    assert ids.min() >= 0, f"id {ids.min()} is negative"
    assert ids.max() < len(ids), f"id {ids.max()} of {len(ids)} classes"
    assert (ids != torch.arange(len(ids), device=ids.device).unsqueeze(1)).all(), "a class is its own neighbour"
    assert (ids.sort(dim=1).values.diff(dim=1) != 0).all(), "a neighbour is listed twice"
    selected = ids[expected.rows]
    is_selected = torch.zeros_like(expected.similarities, dtype=torch.bool).scatter_(1, selected, True)
    values = expected.similarities.gather(1, selected)
    if similarities is None:
        values = values.sort(dim=1, descending=True).values
    else:
        error = (similarities[expected.rows].double() - values).abs().max().item()
        assert error <= value_error, f"similarities are off by {error:.2g}, more than {value_error:.2g}"
    error = (expected.values - values).abs().max().item()
    assert error <= 2 * ranking_error, f"neighbours are less similar by {error:.2g}, more than {2 * ranking_error:.2g}"
    return is_selected.gather(1, expected.ids).double().mean().item()


def rounding_error(dtype: torch.dtype, dim: int) -> float:
    """The largest error of a cosine of unit vectors in `dtype`; half precision is summed in fp32.

    Of an fp32 sum on tensor cores every 16th partial sum may be truncated.
    """
    if dtype == torch.float32:
        return max(1e-5, dim * 2.0**-28)
    return {torch.float64: 1e-10, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-7}[dtype]


class Method(NamedTuple):
    """How a provider is made: `prepare(table, k)` does what is not timed and returns what is."""

    prepare: Callable[[Tensor, int], Callable[[], Graph]]
    ranking_error: float
    value_error: float
    note: str = ""
    products: torch.dtype | None = None


def methods(case: Case, device: torch.device) -> dict[str, Method]:
    """The providers of a case by name."""
    classes, dim, _ = case.sizes
    is_cuda, is_half = device.type == "cuda", case.dtype.itemsize == 2
    single = TF32_ERROR if is_cuda and config.precision() == "tf32" else rounding_error(torch.float32, dim)
    exact = rounding_error(case.dtype, dim) if case.dtype == torch.float64 else single
    rounded = rounding_error(case.dtype, dim) if is_half else exact
    products = torch.float32 if is_half and not is_cuda else None  # the CPU path widens half precision
    warm = f"from the graph of a table {EPOCH_STEP:.0%} away, built outside the time"
    found = {
        OURS: Method(_ours, exact, exact, products=products),
        f"{OURS} warm": Method(_warm, exact, exact, warm, products),
    }
    if not is_cuda:
        if importlib.util.find_spec("faiss"):
            found["faiss flat"] = Method(_faiss, single, single, products=torch.float32)
        found["blocked mm + topk"] = Method(partial(_strips, rows=STRIP_ROWS), rounded, rounded)
        return found
    if case.dtype == torch.float32:
        half = rounding_error(torch.bfloat16, dim)
        bf16 = partial(_ours, dtype=torch.bfloat16)
        found[f"{OURS} bf16"] = Method(bf16, half, half, products=torch.bfloat16)
        found[f"{OURS} bf16 + rescore"] = Method(partial(bf16, rescore=True), half, single, products=torch.bfloat16)
    rows = max(1, STRIP_BYTES // (classes * case.dtype.itemsize))
    found["cuBLAS strips + topk"] = Method(partial(_strips, rows=rows), rounded, rounded)
    if importlib.util.find_spec("faiss") and hasattr(importlib.import_module("faiss"), "StandardGpuResources"):
        found["faiss gpu"] = Method(_faiss, single, single, "its memory is not torch's", torch.float32)
    if importlib.util.find_spec("flashlib"):
        note = "products in tf32" if case.dtype == torch.float32 else ""
        found["flashlib knn"] = Method(_flashlib, max(rounded, TF32_ERROR), TF32_ERROR, note)
    return found


def providers(case: Case, part: str, table: Tensor) -> list[measure.Provider]:
    """The providers of a case."""
    k, expected = case.sizes[-1], cache(expected_neighbors)

    def provider(name: str, method: Method) -> measure.Provider:
        prepare, work, has_peak = partial(method.prepare, table, k), useful_work(case), name != "faiss gpu"

        def checked(graph: Graph) -> float:
            return check(expected(table, k), method.ranking_error, method.value_error, graph)

        return measure.Provider(name, prepare, checked, work, method.note, method.products, has_peak)

    return [provider(name, method) for name, method in methods(case, table.device).items()]


def _ours(table: Tensor, k: int, dtype: torch.dtype | None = None, rescore: bool = False) -> Callable[[], Graph]:
    return partial(functional.class_neighbors, table, k, return_similarities=True, dtype=dtype, rescore=rescore)


def _warm(table: Tensor, k: int) -> Callable[[], Graph]:
    previous = functional.class_neighbors(table_of_previous_epoch(table), k)
    return partial(functional.class_neighbors, table, k, return_similarities=True, previous=previous)


def _strips(table: Tensor, k: int, rows: int) -> Callable[[], Graph]:
    """Normalise once, multiply a strip of rows with all, exclude each row itself, select."""

    def call() -> Graph:
        unit = normalize(table.float() if table.dtype.itemsize == 2 else table).to(table.dtype)
        selected = []
        for start in range(0, len(table), rows):
            similarities = torch.mm(unit[start : start + rows], unit.mT)
            similarities.diagonal(start).fill_(-torch.inf)
            selected.append(similarities.topk(k))
        return torch.cat([part.values for part in selected]), torch.cat([part.indices for part in selected])

    return call


def _faiss(table: Tensor, k: int) -> Callable[[], Graph]:
    """Normalisation and the index's copy are part of the time, as they would be in every epoch."""
    import faiss
    import faiss.contrib.torch_utils  # lets an index take tensors

    faiss.omp_set_num_threads(torch.get_num_threads())
    make_index = partial(faiss.IndexFlatIP, table.shape[1])
    if table.is_cuda:
        resources = faiss.StandardGpuResources()
        resources.setDefaultNullStreamAllDevices()  # torch's stream, which events see
        make_index = partial(faiss.GpuIndexFlatIP, resources, table.shape[1])

    def call() -> Graph:
        unit = normalize(table.float())
        index = make_index()
        index.add(unit)
        return exclude_self(*index.search(unit, k + 1))

    return call


def _flashlib(table: Tensor, k: int) -> Callable[[], Graph]:
    """By squared distance of unit vectors, which ranks as the cosine does."""
    from flashlib import flash_knn

    def call() -> Graph:
        unit = normalize(table.float()).to(table.dtype)
        ids = flash_knn(unit, unit, k + 1, return_distances=False).long()
        return None, exclude_self(ids, ids)[1]

    return call


def exclude_self(similarities: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Drop each row's own id from lists `[N, K + 1]`, or the last entry if a class is not in its own list."""
    keep = ids != torch.arange(len(ids), device=ids.device).unsqueeze(1)
    keep[:, -1] &= ~keep.all(1)
    shape = (len(ids), ids.shape[1] - 1)
    return similarities[keep].view(shape), ids[keep].view(shape)


def useful_work(case: Case) -> tuple[float, float]:
    """Useful FLOPs and bytes; similarities are written in fp32 at least."""
    classes, dim, k = case.sizes
    width = case.dtype.itemsize
    return float(classes) * (classes - 1) * dim, float(classes) * (dim * width + k * (max(width, 4) + 8))
