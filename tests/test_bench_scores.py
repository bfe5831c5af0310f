"""The study of the matching kernels, small: its truth, its checks, and both ops from the command line to the file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench import __main__ as command
from bench import eager, matching, measure, scores, table
from bench.matching import Case, Problem

CPU = torch.device("cpu")
CLASSES, PAIRS = (scores.TINY[op][0]._replace(dtype=torch.float64) for op in ("classes", "pairs"))
EXACT = matching.Tolerance(1e-12, 1 - 1e-12, 1e-12)


@pytest.fixture(scope="module", autouse=True)
def _quick_ceilings() -> Iterator[None]:
    """A product in half precision that is large takes a minute on a CPU without instructions for it."""
    ceilings = measure.matmul_ceiling, measure.copy_ceiling
    with mock.patch.dict(measure.MATMUL_SIZE, cpu=128), mock.patch.dict(measure.COPY_BYTES, cpu=2**20):
        for ceiling in ceilings:
            ceiling.cache_clear()
        yield
    for ceiling in ceilings:
        ceiling.cache_clear()


@pytest.fixture
def classes() -> Problem:
    return matching.build("classes", CLASSES, CPU)


@pytest.fixture
def pairs() -> Problem:
    return matching.build("pairs", PAIRS, CPU)


def _gradients(problem: Problem, values: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(values, problem.inputs("backward"), problem.upstream))


def test_a_problem_is_the_same_again_and_well_formed(classes: Problem) -> None:
    again = matching.build("classes", CLASSES, CPU, sparse_grad=True)
    assert torch.equal(again.items, classes.items)
    assert torch.equal(again.probe, classes.probe)
    assert torch.equal(again.upstream, classes.upstream)
    neighbors = classes.matcher.class_neighbors
    assert torch.equal(again.matcher.class_neighbors, neighbors)
    assert neighbors.shape == (40, 5)
    assert (neighbors != torch.arange(40).unsqueeze(1)).all()
    assert (neighbors.sort(1).values.diff(dim=1) > 0).all()
    assert classes.labels.unique(return_counts=True)[1].tolist() == [2, 2, 2]
    assert classes.probe.is_contiguous()
    assert classes.items.is_contiguous(memory_format=torch.channels_last)


def test_the_truth_is_that_of_plain_code(classes: Problem, pairs: Problem) -> None:
    every = classes._replace(labels=None)
    maps = classes.matcher.class_embed
    for problem, values in (
        (classes, eager.per_label(classes.matcher, classes.probe, classes.labels)),
        (classes, eager.vectorised(classes.matcher, classes.probe, classes.labels, 2)),
        (every, eager.all_pairs(classes.matcher, classes.probe, maps)),
        (pairs, eager.all_pairs(pairs.matcher, pairs.probe, pairs.items)),
        (pairs, eager.all_pairs_tuned(pairs.matcher, pairs.probe, pairs.items)),
    ):
        true = matching.truth(problem, True)
        assert matching.check_scores(true, EXACT, values).wrong == ""
        assert matching.check_gradients(true, EXACT, _gradients(problem, values)).wrong == ""
        untouched = 40 - len(classes.matcher.class_neighbors[classes.labels].unique()) if problem is classes else 0
        assert len(true.untouched) == untouched
    pairs.matcher.eval()
    true = matching.truth(pairs, False)
    assert (
        matching.check_scores(true, EXACT, eager.match(eager.all_pairs, pairs.matcher, pairs.probe, pairs.items)).wrong
        == ""
    )


def test_a_truth_of_a_sample_is_that_part_of_the_whole(pairs: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, frozen = matching.truth(pairs, True), matching.truth(pairs, False)
    monkeypatch.setattr(matching, "BLOCK", 3 * 5 * 6**2)  # three items at a time
    monkeypatch.setattr(matching, "TRUE_PAIRS", 14)
    sample = matching.truth(pairs, True)
    assert torch.allclose(sample.scores, whole.scores, atol=1e-12)
    assert sample.ids.tolist() == [0, 1, 2]
    assert torch.allclose(sample.items, whole.items[:3], atol=1e-12)
    assert torch.allclose(sample.probe, whole.probe[:2], atol=1e-12)
    assert torch.allclose(sample.weight, whole.weight, atol=1e-12)
    some = matching.truth(pairs, False)
    assert some.rows.tolist() == [0, 4]
    assert torch.allclose(some.scores, frozen.scores[[0, 4]], atol=1e-12)
    found = eager.all_pairs(pairs.matcher, pairs.probe, pairs.items)
    assert matching.check_gradients(sample, EXACT, _gradients(pairs, found)).wrong == ""


def test_the_checks_see_what_is_wrong(classes: Problem) -> None:
    true, limit = matching.truth(classes, True), matching.tolerance(torch.float32)
    values = eager.vectorised(classes.matcher, classes.probe, classes.labels, 2)
    gradients = _gradients(classes, values)
    column = int((true.scores[0] == 0).nonzero()[0])
    for spoiled, said in ((float("nan"), "scores that are not finite"), (0.1, "scores are off")):
        worse = values.detach().clone()
        worse[0, column] = spoiled
        assert matching.check_scores(true, limit, worse).wrong.startswith(said)
    assert matching.check_scores(true, limit, values[:, :-1]).wrong.startswith("scores [6, 39]")
    assert matching.check_scores(true, limit, values[:-1]).wrong.startswith("scores [5, 40]")
    assert matching.check_scores(true, limit, values.detach() * 1.0001).wrong == ""

    def wrong(position: int, replacement: Tensor) -> str:
        changed = [*gradients]
        changed[position] = replacement
        return matching.check_gradients(true, limit, changed).wrong

    other = gradients[1].clone()
    other[true.untouched[-1], 3, 1, 0] = 1e-30
    assert wrong(1, other) == "a gradient in rows that were not touched"
    assert wrong(1, gradients[1].roll(1, dims=3)).startswith("gradient of items: cosine")
    assert wrong(0, gradients[0] * 1.1) == "gradient of probes: 1.100 times as long as the truth"
    assert wrong(0, gradients[0] * torch.nan).startswith("gradient of probes: cosine nan")
    assert wrong(2, -gradients[2]).startswith("gradient of fc.weight: cosine -1")
    for ids, said in ((true.ids, ""), (true.ids[1:], "a sparse gradient of other rows than those touched")):
        rows = torch.sparse_coo_tensor(ids.unsqueeze(0), gradients[1][ids], gradients[1].shape, check_invariants=True)
        assert wrong(1, rows) == said


def test_maxsim_both_ways_is_the_sum_of_pooled_values(pairs: Problem) -> None:
    def maxsim(queries: Tensor, documents: Tensor) -> Tensor:
        return torch.einsum("qsc,drc->qdsr", queries, documents).amax(3).sum(2)

    method = scores.Method(partial(scores._both_ways, maxsim), sums=True)
    true = matching.truth(pairs, True, sums=True)
    assert matching.check_scores(true, EXACT, scores.prepare(method, pairs, "forward")()).wrong == ""
    for part in ("backward", "step"):
        assert matching.check_gradients(true, EXACT, scores.prepare(method, pairs, part)()).wrong == ""


def test_useful_work(classes: Problem, pairs: Problem) -> None:
    operations = 2 * 6 * 6 * 16
    assert [matching.work(classes, part)[0] / (6 * 5 * operations) for part in scores.TRAINING] == [1, 2, 3]
    assert matching.work(classes._replace(labels=None), "forward")[0] == 6 * 40 * operations
    assert matching.work(pairs, "match")[0] == 5 * 7 * operations
    maps, values = 8 * (5 + 7) * 6 * 16, 8 * 5 * 7
    pooled = 5 * 7 * 12 * (8 + 1)
    assert matching.work(pairs, "match")[1] == maps + values
    assert matching.work(pairs, "forward")[1] == maps + values + pooled
    assert matching.work(pairs, "step")[1] == 3 * maps + 2 * (values + pooled)


@pytest.mark.parametrize("op", ["classes", "pairs"])
def test_tiny_from_the_command_line_to_the_file(op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main([op, "--tiny", "--device", "cpu", "--no-memory", "--output", str(tmp_path)])
    (path,) = tmp_path.glob(f"*/{op}.csv")
    found = {(row.part, row.provider): row for row in table.read(path)}
    (case,) = scores.TINY[op]
    assert set(found) == {
        (part, name) for part in case.parts for name in scores.methods(op, part, CPU) if name in case.only
    }
    printed = capsys.readouterr().out
    for (part, name), row in found.items():
        assert row.status == "ok", row
        assert (row.op, row.case, row.dtype, row.base) == (op, case.name, "float32", scores.OURS)
        assert row.repeats == case.repeats
        assert min(row.median_s, row.ratio, row.tflops, row.share_of_copy) > 0
        assert f"{op} {case.name} {part} float32" in printed
        assert f"| {name} |" in printed
    if op == "classes":
        every, ours = found["step", scores.EVERY], found["step", scores.OURS]
        assert every.note == "8.0 times the pairs, all counted"
        assert every.tflops * every.median_s == pytest.approx(8 * ours.tflops * ours.median_s)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_tiny_in_other_dtypes(dtype: str) -> None:
    for op in ("classes", "pairs"):
        options = command.parser().parse_args([op, "--tiny", "--dtype", dtype, "--device", "cpu", "--no-memory"])
        for found in scores.run(options):
            assert [row.status for row in found] == ["ok"] * len(found), found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_rows_carry_peak_memory_but_for_a_backward_alone() -> None:
    case = "64x64x64x7x7"  # [P, G, S, S] is 39 MB
    options = command.parser().parse_args(
        ["pairs", "--cases", case, "--device", "cpu", "--repeats", "1", "--providers", "published"]
    )
    options.parts = ["forward", "backward"]
    (forward,), (backward,) = scores.run(options)
    assert forward.status == backward.status == "ok"
    assert forward.peak_bytes > 4 * 64 * 64 * 49 * 49
    assert backward.peak_bytes is None


def test_a_compiler_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: object) -> object:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(scores, "_compiled", fail)
    options = command.parser().parse_args(
        ["pairs", "--tiny", "--device", "cpu", "--no-memory", "--providers", "tuned", "--parts", *scores.TRAINING]
    )
    for tuned, compiled in scores.run(options):
        assert tuned.status == "ok"
        assert compiled.status == "failed: RuntimeError: no compiler"
        assert compiled.median_s is None


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("default")  # of the compiler's own
def test_compiled_baselines_are_right(dtype: str) -> None:
    for op in ("classes", "pairs"):
        options = command.parser().parse_args(
            [op, "--tiny", "--dtype", dtype, "--device", "cpu", "--no-memory", "--providers", "compiled"]
        )
        options.parts = ["backward"]  # its graph is compiled, kept, and used again
        ((row,),) = scores.run(options)
        assert row.status == "ok", row


@pytest.mark.parametrize(
    ("cases", "batch", "classes", "k"),
    [
        (scores.CPU_CASES, 64, {1000: 64, 2000: 64, 4000: 64, 8000: 64}, {16, 32, 64, 128, 256}),
        (scores.CUDA_CASES, 256, {2500: 256, 5000: 256, 10572: 256, 21144: 256}, {32, 64, 128, 256}),
    ],
)
def test_sweeps_of_the_class_path(
    cases: dict[str, list[Case]], batch: int, classes: dict[int, int], k: set[int]
) -> None:
    known = cases["classes"]
    assert len({(case.name, case.dtype) for case in known}) == len(known)  # none twice
    dtype = torch.float32 if cases is scores.CPU_CASES else torch.bfloat16
    sizes = {case.sizes for case in known if case.dtype == dtype and "step" in case.parts}
    assert {(batch, count, near, 512, 7, 7, 4) for count, near in classes.items()} <= sizes
    among = 2000 if cases is scores.CPU_CASES else 10572
    assert {size[2] for size in sizes if size[1] == among and size[-1] == 4} == k


def test_a_slow_provider_has_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    case = scores.SWEPT(CLASSES.sizes)
    monkeypatch.setitem(scores.CPU_CASES, "classes", [case])
    (found,) = scores.run(command.parser().parse_args(["classes", "--device", "cpu", "--no-memory"]))
    assert {row.provider: row.repeats for row in found} == {scores.OURS: 3, scores.PER_LABEL: 2, scores.VECTORISED: 3}


def test_cases_by_name_dtype_and_part() -> None:
    def chosen(*given: str, device: str = "cpu") -> list[Case]:
        options = command.parser().parse_args([*given, "--device", device])
        return scores._chosen(options, torch.device(device))

    for op in ("classes", "pairs"):
        assert chosen(op) == scores.CPU_CASES[op]
        assert chosen(op, device="cuda") == scores.CUDA_CASES[op]
        for case in (*chosen(op), *chosen(op, device="cuda")):
            assert {again.sizes for again in chosen(op, "--cases", case.name)} == {case.sizes}
    assert [case.parts for case in chosen("pairs", "--parts", "step", "match")] == [("step",), ("match",), ("match",)]
    assert chosen("classes", "--parts", "match") == []
    half = chosen("classes", "--dtype", "bfloat16")
    (large,) = (case for case in half if case.name == "64x10000x256x512x7x7x4")  # there in bf16: not made of another
    assert large == scores.CPU_CASES["classes"][2]
    assert {case.dtype for case in half} == {torch.bfloat16}
    assert [case.name for case in half] == list(dict.fromkeys(case.name for case in half))
    assert {case.name for case in half} == {case.name for case in chosen("classes")}
    assert chosen("pairs", "--cases", "8x8x4x2x2")[0].parts == scores.TRAINING
    assert chosen("pairs", "--cases", "8x9x4x2x2")[0].parts == scores.MATCH
    assert chosen("pairs", "--cases", "8x9x4x2x2", "--parts", "step")[0].parts == ("step",)
    swept = ("classes", "--cases", "64x2000x64x512x7x7x4")
    assert [case.parts for case in chosen(*swept)] == [("step",)]
    assert [case.parts for case in chosen(*swept, "--parts", "step", "forward")] == [("forward", "step")]  # if named
    assert chosen(*swept, "--parts", "match") == []
    for op, name in (
        ("classes", "64x64x512x7x7"),
        ("classes", "8x9x9x4x2x2x1"),
        ("classes", "8x9x3x4x2x2x3"),
        ("pairs", "8x8"),
    ):
        with pytest.raises(ValueError, match=name):
            chosen(op, "--cases", name)
    with pytest.raises(SystemExit):
        command.main(["--cases", "8x8x4x2x2"])
