"""Smoke tests that `make gpu-check` adds to the others: every kernel once, the same bits again, nothing compiled twice.

The tests marked `smoke` are few and small, for compute-sanitizer; they run without a GPU, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import graph, problems
from bench.cases import Case
from qaconv_triton import QAConv, SoftmaxTripletLoss, functional, reference

BLOCK_COLUMNS, K = 128, 30
# locations of one tile, of one with a ragged edge, of several with a ragged last; odd channels and counts
SIZES = {
    "classes": ((6, 13, 5, 33, 3, 2, 2), (6, 11, 7, 40, 7, 7, 2), (4, 9, 3, 20, 24, 8, 2)),
    "pairs": ((5, 7, 33, 3, 2), (3, 5, 40, 7, 7), (2, 3, 20, 24, 8)),
}
# dtype of the maps, and of autocast
PRECISIONS = (
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
)
CUDA = torch.cuda.is_available()
CASES = [(op, sizes, *PRECISIONS[number]) for op in SIZES for number, sizes in enumerate((*SIZES[op], SIZES[op][0]))]
if not CUDA:  # the interpreter is slow, and other tests go through the sizes
    CASES = [(op, SIZES[op][0], *precision) for op, precision in zip(SIZES, PRECISIONS[::3], strict=True)]


def adversarial_table() -> Tensor:
    """A table `[1654, 16]` whose first columns are far from class 0, and later ones near: more than a buffer holds."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(13 * BLOCK_COLUMNS - 10, 16, generator=generator)
    similar = torch.cat([torch.arange(BLOCK_COLUMNS // 2), torch.arange(3 * BLOCK_COLUMNS, 11 * BLOCK_COLUMNS)])
    table[similar] = table[0] + 0.3 * table[similar]
    return table * (0.1 + torch.rand(len(table), 1, generator=generator))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors go to the Triton kernels, also on the CPU."""
    pytest.importorskip("triton")
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "triton")


@pytest.mark.smoke
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overflow", [False, True])
def test_class_graph(dtype: torch.dtype, overflow: bool, device: torch.device) -> None:
    table = adversarial_table()[: None if CUDA else 400].to(dtype)
    # as a previous graph the farthest classes give thresholds so low that the buffers overflow
    previous = reference.cosine_topk(table.double(), -table.double(), K)[1].to(device) if overflow else None
    found = functional.class_neighbors(table.to(device), K, return_similarities=True, previous=previous)
    expected = graph.expected_neighbors(table, K)
    recall = graph.check(expected, 2e-5, 2e-5, (found[0].cpu(), found[1].cpu()))
    assert recall > 0.99


@pytest.mark.smoke
@pytest.mark.usefixtures("kernels")
def test_topk_of_another_gallery(device: torch.device) -> None:
    table = adversarial_table()
    queries, keys = table[:77, None, None].reshape(77, 8, 2, 1), table[100:301].reshape(201, 8, 2, 1)
    similarities, ids = functional.topk_cosine(queries.to(device), keys.to(device), 17)
    unit = [reference.normalize(maps.flatten(1).double()) for maps in (queries, keys)]
    expected = reference.cosine_topk(*unit, 17, False)[0]
    torch.testing.assert_close(similarities.double().cpu(), expected, atol=2e-5, rtol=0)
    assert (ids.sort(1).values.diff(dim=1) > 0).all()
    torch.testing.assert_close((unit[0] @ unit[1].mT).gather(1, ids.cpu()), expected, atol=4e-5, rtol=0)


@pytest.mark.smoke
@pytest.mark.usefixtures("kernels")
def test_candidates_beyond_the_end_of_a_buffer_are_stored_nowhere(device: torch.device) -> None:
    from qaconv_triton.common.candidates import EMPTY, unpack
    from qaconv_triton.common.chunks import ChunkedTable
    from qaconv_triton.kernels import config, topk_kernels, topk_search

    count, capacity, untouched = 150, 37, 12345
    table = adversarial_table()[:count].to(device)
    (chunk,) = ChunkedTable(table, count, device, table.dtype).chunks([0])
    memory = torch.full((count + 1, capacity), untouched, device=device)
    buffer = topk_kernels.CandidateBuffer(count, capacity, device)
    buffer.candidates, buffer.thresholds = memory[:count], torch.full_like(buffer.thresholds, EMPTY)
    tiling = config.cosine_topk(table.shape[1], 4)[0]
    search = topk_search.TopKSearch(1, capacity, tiling, memory[:count, :1], buffer.thresholds, None)
    search._launch(chunk, chunk, buffer, buffer, 0, search._steps(count, is_same=True))
    assert (memory[count] == untouched).all()
    assert (buffer.counts == count - 1).all()
    similarities, ids = unpack(memory[:count])
    unit = reference.normalize(table.double())
    torch.testing.assert_close((unit @ unit.mT).gather(1, ids).float(), similarities, atol=2e-5, rtol=0)
    assert (ids != torch.arange(count, device=device)[:, None]).all()
    assert (ids.sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.smoke
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize(("op", "sizes", "dtype", "autocast_dtype"), CASES)
def test_scores_and_gradients(
    op: str,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    autocast_dtype: torch.dtype | None,
    sparse_grad: bool,
    device: torch.device,
) -> None:
    if sparse_grad and op == "pairs":
        pytest.skip("a gallery's gradient is dense")
    problem = problems.build(Case(op, sizes, dtype=dtype), torch.device("cpu"), sparse_grad)
    limit = problems.tolerance(autocast_dtype or dtype)
    in_eval, in_training = (problems.expected_result(problem, part) for part in ("match", "step"))
    problem = _moved(problem, device)
    matcher = problem.matcher
    score = partial(matcher, problem.probe, problem.gallery)
    if problem.labels is not None:
        score = partial(matcher, problem.probe, labels=problem.labels)
    autocast = partial(torch.autocast, device.type, autocast_dtype or torch.bfloat16, autocast_dtype is not None)
    matcher.eval()
    with torch.no_grad(), autocast():
        problems.check_scores(in_eval, limit, score().cpu())
        matched = matcher.match(problem.probe, problem.gallery)
        every_pair = problems.expected_result(problem._replace(labels=None), "match")
    problems.check_scores(every_pair, limit, matched)
    matcher.train()
    with autocast():
        scores = score()
    problems.check_scores(in_training, limit, scores.cpu())
    gradients = torch.autograd.grad(scores, problem.inputs("step"), problem.upstream)
    problems.check_gradients(in_training, limit, [gradient.cpu() for gradient in gradients])


def _moved(problem: problems.Problem, device: torch.device) -> problems.Problem:
    matcher = problem.matcher.to(device)
    gallery = (
        matcher.class_embed if problem.labels is not None else problem.gallery.detach().to(device).requires_grad_()
    )
    assert gallery is not None
    return problem._replace(
        probe=problem.probe.detach().to(device).requires_grad_(),
        gallery=gallery,
        labels=None if problem.labels is None else problem.labels.to(device),
        upstream=problem.upstream.to(device),
    )


def training_hashes() -> dict[str, str]:
    """Hashes of the losses, gradients, graphs and parameters of a few training steps, in fp32 and under autocast."""
    device = torch.device("cuda" if CUDA else "cpu")
    batch, classes, k, channels, size, count = (64, 1000, 64, 512, 7, 3) if CUDA else (4, 8, 3, 16, 2, 1)
    hashes: dict[str, str] = {}
    for autocast in (False, True):
        torch.manual_seed(0)  # on the CPU, whose random numbers are the same everywhere
        matcher = QAConv(channels, size, size, classes, k, include_self=True)
        features = torch.randn(count, batch, channels, size, size).to(device)
        labels = torch.randint(classes, (count, batch // 2)).repeat_interleave(2, dim=1).to(device)
        criterion = SoftmaxTripletLoss(matcher).to(device)
        optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1)
        for step, (feature, target) in enumerate(zip(features, labels, strict=True)):
            matcher.on_epoch_start()
            feature.requires_grad_()
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, autocast):
                outputs = criterion(feature, target)
                pairs = matcher(feature, "same")
            (outputs[2].mean() + pairs.sigmoid().mean()).backward()
            optimizer.step()
            gradients = [feature.grad, *(weight.grad for weight in criterion.parameters())]
            kept = [*outputs, pairs, *gradients, *criterion.state_dict().values()]
            for number, tensor in enumerate(kept):
                content = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
                hashes[f"autocast {autocast}, step {step}, tensor {number}"] = hashlib.sha256(content).hexdigest()
    return hashes


def _in_a_process(code: str, **variables: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | variables,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_training_has_the_same_bits_in_two_processes() -> None:
    code = "import json, test_gpu; print(json.dumps([test_gpu.training_hashes() for _ in range(2)]))"
    runs = [run for _ in range(2) for run in json.loads(_in_a_process(code))]
    assert len(runs[0]) > 50
    for run in runs[1:]:
        assert [name for name in run if run[name] != runs[0][name]] == []


def training_steps(batch: int, k: int) -> None:
    """Class path, all pairs and matching without gradients; the graph is drawn."""
    matcher = QAConv(512, 7, 7, 1000, k).cuda()
    matcher.class_neighbors = torch.rand(1000, 1000, device="cuda").topk(k).indices
    feature = torch.randn(batch, 512, 7, 7, device="cuda", requires_grad=True)
    for autocast in (False, True):
        with torch.autocast("cuda", torch.bfloat16, autocast):
            matcher.train()
            matcher(feature, labels=torch.randint(1000, (batch,), device="cuda")).square().mean().backward()
            if batch > 1:  # one pair has no batch statistics
                matcher(feature, "same").square().mean().backward()
            matcher.eval()
            matcher.match(feature, feature)


@pytest.mark.cuda
@pytest.mark.slow
def test_another_batch_size_or_k_compiles_nothing(tmp_path: Path) -> None:
    def compiled(*sizes: tuple[int, int]) -> set[str]:
        code = f"import test_gpu; [test_gpu.training_steps(*sizes) for sizes in {sizes}]"
        _in_a_process(code, TRITON_CACHE_DIR=str(tmp_path), QACONV_TRITON_CACHE_DIR=str(tmp_path / "tuned"))
        return {path.name for path in tmp_path.rglob("*.cubin")}

    first = compiled((64, 20))
    assert first
    assert compiled((48, 20), (17, 19), (1, 7)) == first
