"""The benchmarks: what they time, what they reject, what they count, and their files, on small cases."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench import __main__ as command
from bench import baselines, cases, graph, measure, problems, report, results, scores
from bench.measure import Provider

CPU = torch.device("cpu")
MEGABYTES = 64
CLASSES, PAIRS = (case._replace(dtype=torch.float64) for case in scores.TINY)
EXACT = problems.Tolerance(1e-12, 1 - 1e-12, 1e-12)


@pytest.fixture(scope="module", autouse=True)
def _small_ceilings() -> Iterator[None]:
    """A large product in half precision takes a minute on a CPU without instructions for it."""
    with mock.patch.dict(measure.MATMUL_SIZE, cpu=128), mock.patch.dict(measure.COPY_BYTES, cpu=2**20):
        measure.matmul_ceiling.cache_clear()
        measure.copy_ceiling.cache_clear()
        yield
    measure.matmul_ceiling.cache_clear()
    measure.copy_ceiling.cache_clear()


def accept(result: object) -> float:
    return 1.0


def expect_two(result: object) -> None:
    assert result == 2, f"{result} is not 2"


def provider(name: str, function: measure.Call, check: Callable[[object], float | None], note: str = "") -> Provider:
    return Provider(name, lambda: function, check, (1e6, 2e6), note)


def measured(*providers: Provider, repeats: int = 3) -> list[results.Row]:
    case = cases.Case("op", (9, 9), repeats=repeats)
    return measure.rows(case, "match", providers, CPU, memory=False, base=providers[0].name)


# Times


def test_providers_run_in_turn_after_a_warm_up_each() -> None:
    calls: list[str] = []
    providers = [provider(name, partial(calls.append, name), accept) for name in "abc"]
    timings = measure.compare(providers, 2, CPU)
    assert "".join(calls) == "abc" * 3
    assert all(len(timing.seconds) == 2 for timing in timings.values())


def test_the_ratio_is_the_median_of_the_ratios_within_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.0, 2.0, 2.0, 4.0, 8.0])  # a b a b a b: ratios 3, 1, 2; the ratio of the medians is 3 / 2
    ceilings = measure.copy_ceiling(CPU), measure.matmul_ceiling(CPU, torch.float32)  # cached
    monkeypatch.setattr(measure, "stopwatch", lambda device: lambda function: next(clock))
    base, other = measured(*(provider(name, lambda: None, accept) for name in "ab"))
    assert (base.ratio, other.ratio) == (1.0, 2.0)
    assert (other.lower_s, other.median_s, other.upper_s) == (2.5, 3.0, 5.5)
    assert (other.copy_gbs, other.matmul_tflops) == ceilings


def test_a_wrong_result_or_an_error_has_no_time() -> None:
    calls: list[str] = []

    def fail(after: int) -> None:
        calls.append("call")
        if len(calls) > after:
            raise MemoryError("no room\nfor that")

    def prepare() -> Callable[[], object]:
        raise ImportError("no compiler")

    rows = measured(
        provider("wrong", lambda: 3, expect_two),
        provider("right", lambda: 2, expect_two),
        provider("fails later", partial(fail, 2), accept),
        provider("fails", partial(fail, 0), accept, note="a note"),
        Provider("unprepared", prepare, accept, (1e6, 2e6)),
    )
    assert [row.status for row in rows] == [
        "wrong: 3 is not 2",
        "ok",
        "failed: MemoryError: no room",
        "failed: MemoryError: no room",
        "failed: ImportError: no compiler",
    ]
    assert rows[1].median_s is not None
    assert rows[1].ratio is None  # the base has no time
    for row in (rows[0], *rows[2:]):
        assert (row.median_s, row.ratio, row.tflops, row.share_of_matmul, row.share_of_copy) == (None,) * 5
    assert "| fails |  |  |  |  |  |  |  | failed: MemoryError: no room; a note |" in results.markdown(rows)


def test_work_and_its_shares_of_the_ceilings() -> None:
    (row,) = measured(provider("sleep", partial(time.sleep, 0.001), accept))
    assert row.repeats == 3
    assert row.tflops == pytest.approx(1e6 / row.median_s / 1e12)
    assert row.share_of_matmul == pytest.approx(row.tflops / row.matmul_tflops)
    assert row.share_of_copy == pytest.approx(2e6 / row.median_s / 1e9 / row.copy_gbs)
    assert "op 9x9 match float32" in results.markdown([row])


def _fill(megabytes: int) -> Tensor:
    return torch.ones(megabytes * 2**18)  # fp32: written, so resident


def _make_fill(megabytes: int) -> measure.Call:
    _fill(96)  # memory that was freed before does not count
    return partial(_fill, megabytes)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_of_a_known_allocation() -> None:
    peak = measure.resident_peak(_make_fill, 1, MEGABYTES)
    assert peak is not None
    assert abs(peak - MEGABYTES * 2**20) < 16 * 2**20


@pytest.mark.cuda
def test_peak_memory_and_time_on_a_gpu(device: torch.device) -> None:
    peak = measure.device_peak(lambda: torch.ones(MEGABYTES * 2**18, device=device), device)
    assert peak == MEGABYTES * 2**20
    assert measure.stopwatch(device)(lambda: torch.ones(2**20, device=device)) > 0


# The class graph


TABLE, K = graph.build(graph.TINY[0], CPU), graph.TINY[0].sizes[-1]


@pytest.fixture(scope="module")
def expected() -> graph.Expected:
    return graph.expected_neighbors(TABLE, K)


def test_expected_neighbors_are_those_of_the_whole_matrix(expected: graph.Expected) -> None:
    wide = TABLE.double()
    similarities = wide @ wide.T / wide.norm(dim=1) / wide.norm(dim=1, keepdim=True)
    best = similarities.fill_diagonal_(-math.inf)[expected.rows].topk(K)
    assert torch.equal(expected.ids, best.indices)
    assert torch.allclose(expected.values, best.values)
    # the table has groups, and norms that differ
    assert expected.values[:, 0].median() > similarities.clamp_min(-1).median() + 0.4
    assert TABLE.norm(dim=1).max() > 3 * TABLE.norm(dim=1).min()


def test_a_wrong_graph_is_rejected(expected: graph.Expected) -> None:
    similarities, ids = graph._strips(TABLE, K, 100)()
    assert similarities is not None
    check = partial(graph.check, expected, 1e-5, 1e-5)
    assert check((similarities, ids)) == 1.0
    assert check((None, ids.flip(1))) == 1.0  # a set
    row, far = int(expected.rows[3]), int(expected.similarities[3].argsort()[K])

    def changed(tensor: Tensor, column: int, value: float) -> Tensor:
        copy = tensor.clone()
        copy[row, column] = value
        return copy

    far_similarity = float(expected.similarities[3, far])
    rejected: list[tuple[graph.Graph, str]] = [
        ((None, changed(ids, -1, far)), "neighbours are less similar"),
        ((changed(similarities, -1, far_similarity), changed(ids, -1, far)), "neighbours are less similar"),
        ((similarities.flip(1), ids.flip(1)), "neighbours are less similar"),
        ((similarities, changed(ids, -1, far)), "similarities are off"),
        ((changed(similarities, 0, math.nan), ids), "similarities are off by nan"),
        ((similarities, changed(ids, 0, row)), "a class is its own neighbour"),
        ((similarities, changed(ids, 0, int(ids[row, 1]))), "a neighbour is listed twice"),
        ((similarities, changed(ids, 0, len(TABLE))), "id 600 of 600 classes"),
        ((similarities, changed(ids, 0, -1)), "id -1 is negative"),
        ((similarities, ids[:, 1:]), r"ids \[600, 8\] instead of \[600, 9\]"),
    ]
    for result, message in rejected:
        with pytest.raises(AssertionError, match=message):
            check(result)


@pytest.mark.parametrize("rescore", [False, True])
def test_bf16_graphs_have_the_errors_they_claim(rescore: bool, expected: graph.Expected) -> None:
    half = graph.rounding_error(torch.bfloat16, TABLE.shape[1])
    value_error = graph.rounding_error(torch.float32, TABLE.shape[1]) if rescore else half
    result = graph._ours(TABLE, K, torch.bfloat16, rescore)()
    assert graph.check(expected, half, value_error, result) > 0.9


def test_exclude_self_drops_the_last_if_a_class_is_not_in_its_list() -> None:
    ids = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 3]])
    similarities, others = graph.exclude_self(torch.tensor([[0.9, 0.8, 0.7]]).expand(3, 3), ids)
    assert others.tolist() == [[1, 2], [0, 2], [0, 1]]
    assert torch.equal(similarities, torch.tensor([[0.8, 0.7], [0.9, 0.7], [0.9, 0.8]]))


# Class path and all pairs


@pytest.fixture
def classes() -> problems.Problem:
    return problems.build(CLASSES, CPU)


@pytest.fixture
def pairs() -> problems.Problem:
    return problems.build(PAIRS, CPU)


def gradients_of(problem: problems.Problem, values: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(values, problem.inputs("backward"), problem.upstream))


def test_the_expected_result_is_that_of_the_baselines(classes: problems.Problem, pairs: problems.Problem) -> None:
    for problem, score in (
        (classes, baselines.per_label),
        (classes, baselines.vectorised),
        (classes._replace(labels=None), baselines.all_pairs),
        (pairs, baselines.all_pairs),
        (pairs, baselines.all_pairs_tuned),
    ):
        expected, values = problems.expected_result(problem, "step"), score(problem)
        problems.check_scores(expected, EXACT, values)
        problems.check_gradients(expected, EXACT, gradients_of(problem, values))
    pairs.matcher.eval()
    values = baselines.match(baselines.all_pairs, pairs)
    problems.check_scores(problems.expected_result(pairs, "match"), EXACT, values)


def test_blocks_and_a_sample_of_probes_give_the_same(pairs: problems.Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, in_eval = (problems.expected_result(pairs, part) for part in ("step", "match"))
    monkeypatch.setattr(problems, "BLOCK", 3 * 5 * 6**2)  # three gallery maps at a time
    monkeypatch.setattr(problems, "MAX_EXPECTED_PAIRS", 14)
    sample = problems.expected_result(pairs, "step")
    for part, expected in zip(sample, whole, strict=True):
        assert torch.allclose(part, expected[: len(part)], atol=1e-12)
    assert (len(sample.scores), len(sample.probe), len(sample.gallery)) == (5, 2, 3)
    sample = problems.expected_result(pairs, "match")
    assert sample.rows.tolist() == [0, 4]
    assert torch.allclose(sample.scores, in_eval.scores[[0, 4]], atol=1e-12)


def test_wrong_scores_and_gradients_are_rejected(classes: problems.Problem) -> None:
    expected, limit = problems.expected_result(classes, "step"), problems.tolerance(torch.float32)
    values = baselines.vectorised(classes)
    gradients = gradients_of(classes, values)
    column = int((expected.scores[0] == 0).nonzero()[0])
    for value, message in ((float("nan"), "scores are not finite"), (0.1, "scores are off")):
        changed = values.detach().clone()
        changed[0, column] = value
        with pytest.raises(AssertionError, match=message):
            problems.check_scores(expected, limit, changed)
    for part in (values[:, :-1], values[:-1]):
        with pytest.raises(AssertionError, match=r"scores \["):
            problems.check_scores(expected, limit, part)
    elsewhere = gradients[1].clone()
    untouched = set(range(len(elsewhere))) - set(expected.ids.tolist())
    elsewhere[max(untouched), 3, 1, 0] = 1e-30
    ids = expected.ids[1:].unsqueeze(0)
    fewer = torch.sparse_coo_tensor(ids, gradients[1][ids[0]], gradients[1].shape, check_invariants=True)
    for position, gradient, message in (
        (1, elsewhere, "a row that was not scored has a gradient"),
        (1, fewer, "the sparse gradient is of other rows than those scored"),
        (1, gradients[1].roll(1, dims=3), "gradient of gallery: cosine"),
        (0, gradients[0] * 1.1, "gradient of probe: 1.100x"),
        (0, gradients[0] * torch.nan, "gradient of probe: cosine nan"),
        (2, -gradients[2], "gradient of fc.weight: cosine -1"),
    ):
        with pytest.raises(AssertionError, match=message):
            problems.check_gradients(expected, limit, [*gradients[:position], gradient, *gradients[position + 1 :]])


def test_maxsim_both_ways_is_the_sum_of_pooled_values(pairs: problems.Problem) -> None:
    def maxsim(queries: Tensor, documents: Tensor) -> Tensor:
        return torch.einsum("qsc,drc->qdsr", queries, documents).amax(3).sum(2)

    method = scores.Method(partial(scores.maxsim_both_ways, maxsim), sums=True)
    expected = problems.expected_result(pairs, "step", sums=True)
    problems.check_scores(expected, EXACT, scores.prepare(method, pairs, "forward")())
    for part in ("backward", "step"):
        problems.check_gradients(expected, EXACT, scores.prepare(method, pairs, part)())


def test_useful_work(classes: problems.Problem, pairs: problems.Problem) -> None:
    flops = 2 * 6 * 6 * 16
    work = problems.useful_work
    assert [work(classes, part)[0] / (6 * 5 * flops) for part in cases.TRAINING] == [1, 2, 3]
    assert work(classes._replace(labels=None), "forward")[0] == 6 * 40 * flops
    maps, values, pooled = 8 * (5 + 7) * 6 * 16, 8 * 5 * 7, 5 * 7 * 12 * (8 + 1)
    assert work(pairs, "match") == (5 * 7 * flops, maps + values)
    assert work(pairs, "forward")[1] == maps + values + pooled
    assert work(pairs, "step")[1] == 3 * maps + 2 * (values + pooled)
    assert graph.useful_work(graph.TINY[0]) == (600 * 599 * 64, 4 * 600 * 64 + 600 * 9 * (4 + 8))


# From the command line to the files


@pytest.mark.parametrize("op", ["graph", "classes", "pairs"])
def test_tiny_cases_from_the_command_line_to_the_file(
    op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main([op, "--tiny", "--device", "cpu", "--no-memory", "--output", str(tmp_path)])
    (path,) = tmp_path.glob(f"*/{op}.csv")
    found = {(row.part, row.provider): row for row in results.read(path)}
    if op == "graph":
        assert set(found) == {("", name) for name in graph.methods(graph.TINY[0], CPU)}
    else:
        (case,) = (case for case in scores.TINY if case.op == op)
        assert set(found) == {
            (part, name) for part in case.parts for name in scores.methods(op, part, CPU) if name in case.only
        }
    printed = capsys.readouterr().out
    for (part, name), row in found.items():
        assert row.status == "ok", row
        assert row.base == cases.OURS
        assert row.lower_s <= row.median_s <= row.upper_s
        assert min(row.ratio, row.tflops, row.share_of_copy, row.threads) > 0
        assert row.recall == (1.0 if op == "graph" else None)
        assert " ".join(filter(None, [op, row.case, part, "float32"])) in printed
        assert f"| {name} |" in printed
    if op == "classes":
        every, ours = found["step", scores.EVERY], found["step", scores.OURS]
        assert every.note == "8.0x the pairs, all counted"
        assert every.tflops * every.median_s == pytest.approx(8 * ours.tflops * ours.median_s)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.filterwarnings("default")  # of torch.compile
def test_tiny_cases_in_other_dtypes_and_compiled(dtype: str) -> None:
    for options in ([], ["--providers", "compiled"]):
        for op in ("classes", "pairs"):
            given = [op, "--tiny", "--dtype", dtype, "--device", "cpu", "--no-memory", *options]
            for rows in command.run(command.parser().parse_args(given)):
                assert [row.status for row in rows] == ["ok"] * len(rows), rows


def test_cases_are_selected_by_name_part_and_dtype() -> None:
    def selected(*given: str) -> list[cases.Case]:
        return cases.select(scores.CPU_CASES, command.parser().parse_args(given))

    for op in ("classes", "pairs"):
        assert selected(op) == [case for case in scores.CPU_CASES if case.op == op]
        for case in selected(op):
            assert [again.sizes for again in selected(op, "--cases", case.name)] == [case.sizes]
    assert [case.parts for case in selected("pairs", "--parts", "step", "match")] == [("step",), ("match",), ("match",)]
    assert selected("pairs", "--cases", "64x1000x512x7x7", "--parts", "step")[0].parts == ("step",)
    half = selected("classes", "--dtype", "bfloat16")
    assert {case.dtype for case in half} == {torch.bfloat16}
    assert len({case.name for case in half}) == len(half)
    assert selected("pairs", "--cases", "8x9x4x2x2") == [cases.Case("pairs", (8, 9, 4, 2, 2), cases.PARTS["pairs"])]
    for op, name in (("classes", "64x64x512x7x7"), ("pairs", "8x8"), ("pairs", "8x8x0x2x2")):
        with pytest.raises(ValueError, match=name):
            selected(op, "--cases", name)


def test_rows_survive_the_file_and_replace_earlier_ones(tmp_path: Path) -> None:
    row = results.Row(
        "graph", "9x9x9", "ours", "float32", "ok", 5, 0.1, 0.09, 0.2, 1 / 3, "ours", 7, 1e-9, 0.5, 2e-9, 12.5, 1.0,
        "float32", 'a, "quoted" note', "abc1234", "2.0", "3.0", "Some CPU @ 2 GHz", 2, "2000-01-01 00:00",
        part="forward", share_of_copy=0.25,
    )  # fmt: skip
    assert all(getattr(row, field.name) != field.default for field in dataclasses.fields(row))
    path = results.save([row], tmp_path)
    assert path == tmp_path / "some-cpu-2-ghz" / "graph.csv"
    assert results.read(path) == [row]
    newer = dataclasses.replace(row, median_s=0.3)
    others = [dataclasses.replace(newer, dtype="bfloat16"), dataclasses.replace(newer, part="backward")]
    results.save([newer, *others], tmp_path)
    assert results.read(path) == [newer, *others]


def test_the_committed_page_is_written_from_the_committed_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.main(["--output", str(tmp_path)])
    page = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert page == (report.DOCS / "benchmarks.md").read_text(encoding="utf-8")
    pictures = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert pictures == {path.relative_to(report.DOCS).as_posix() for path in report.DOCS.glob("benchmarks/*/*.png")}
    assert all(f"]({name})" in page for name in pictures)
    rows = [row for path in results.RESULTS.glob("*/*.csv") for row in results.read(path)]
    assert all(results.time(row.median_s) in page for row in rows)
    commands = {f"`python -m bench {row.op} --cases {row.case} " for row in rows if row.op != "compile"}
    assert all(command in page for command in commands)
