"""The benchmarks' harness on functions whose behaviour is known, and the class-graph case end to end, small."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import __main__ as command
from bench import graph, measure, table
from bench.measure import Provider, Verdict

CPU = torch.device("cpu")
MEGABYTES = 64
right = Verdict("", 1.0)


def _fine(result: object) -> Verdict:
    return right


def _fill(megabytes: int) -> Tensor:
    return torch.ones(megabytes * 2**18)  # fp32: written, so resident


def _fill_for_a_while() -> Tensor:
    filled = _fill(MEGABYTES)
    time.sleep(0.05)
    return filled[:1].clone()


def _build() -> tuple[Callable[[], object], Callable[[], object]]:
    inputs = _fill(96)  # memory that was there, or was freed before, does not count
    del inputs
    return partial(_fill, 1), partial(_fill, MEGABYTES)


def test_providers_take_turns_after_one_warm_up_each() -> None:
    calls: list[str] = []
    providers = [Provider(name, partial(calls.append, name), _fine) for name in "abc"]
    timings = measure.compare(providers, base="a", repeats=2, device=CPU)
    assert "".join(calls) == "abc" * 3
    for name in "abc":
        seconds = timings[name].seconds
        assert len(seconds) == 2
        assert seconds == tuple(sorted(seconds))


def test_ratio_is_the_median_of_the_ratios_within_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.0, 2.0, 2.0, 4.0, 8.0])  # a b a b a b: ratios 3, 1, 2, while the medians' is 3 / 2
    monkeypatch.setattr(measure, "stopwatch", lambda device: lambda function: next(clock))
    providers = [Provider(name, lambda: None, _fine) for name in "ab"]
    timings = measure.compare(providers, base="a", repeats=3, device=CPU)
    assert [timings[name].ratio for name in "ab"] == [1.0, 2.0]
    assert timings["b"].seconds == (2.0, 3.0, 8.0)
    assert timings["b"].quartiles == (2.5, 3.0, 5.5)


def test_one_round_has_a_median() -> None:
    assert measure.Timing("ok", seconds=(0.5,)).quartiles == (0.5, 0.5, 0.5)
    assert measure.Timing("wrong: x").quartiles is None


def test_a_wrong_result_or_an_error_has_no_number() -> None:
    calls: list[str] = []

    def fails() -> None:
        raise MemoryError("no room\nfor that")

    def fails_later() -> None:
        calls.append("later")
        if len(calls) > 2:
            raise RuntimeError("worn out")

    providers = [
        Provider("right", lambda: 2, lambda result: right if result == 2 else Verdict("not 2")),
        Provider("wrong", lambda: 3, lambda result: right if result == 2 else Verdict(f"{result} is not 2", 0.5)),
        Provider("fails", fails, _fine, note="as it must"),
        Provider("fails later", fails_later, _fine),
    ]
    found = measure.rows(
        "op", "case", torch.float32, providers, base="wrong", repeats=3, device=CPU, flops=1e6, memory=False
    )
    assert [row.status for row in found] == [
        "ok",
        "wrong: 3 is not 2",
        "failed: MemoryError: no room",
        "failed: RuntimeError: worn out",
    ]
    assert found[0].ratio is None  # the base has no number
    assert found[0].median_s is not None
    for row in found[1:]:
        numbers = (row.median_s, row.lower_s, row.upper_s, row.ratio, row.tflops, row.share_of_matmul, row.peak_bytes)
        assert numbers == (None,) * 7
    printed = table.markdown(found)
    assert (
        "| provider | median | quartiles | rounds | useful TFLOP/s | of torch.mm | recall | note |" in printed
    )  # none is empty
    assert "| wrong |  |  |  |  |  | 0.50000 | wrong: 3 is not 2 |" in printed


def test_a_provider_that_cannot_be_prepared_is_a_row() -> None:
    def prepare() -> Callable[[], object]:
        raise ImportError("no compiler")

    providers = [
        Provider("right", measure.attempt(lambda: lambda: 2), _fine),
        Provider("unprepared", measure.attempt(prepare), _fine),
    ]
    timings = measure.compare(providers, base="right", repeats=1, device=CPU)
    assert [timing.status for timing in timings.values()] == ["ok", "failed: ImportError: no compiler"]


def test_a_provider_may_have_fewer_rounds_and_other_work() -> None:
    providers = [
        Provider("all", lambda: time.sleep(0.001), _fine),
        Provider("fewer", lambda: time.sleep(0.001), _fine, rounds=2, flops=5e6, moved=7e6),
    ]
    every, fewer = measure.rows(
        "op", "case", torch.float32, providers, base="all", repeats=3, device=CPU, flops=1e6, moved=2e6, part="step"
    )
    assert (every.repeats, fewer.repeats) == (3, 2)
    assert every.part == fewer.part == "step"
    for row, flops, moved in ((every, 1e6, 2e6), (fewer, 5e6, 7e6)):
        assert row.tflops == pytest.approx(flops / row.median_s / 1e12)
        assert row.share_of_copy == pytest.approx(moved / row.median_s / 1e9 / row.copy_gbs)
    assert "op case step float32" in table.markdown([every, fewer])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_of_a_known_allocation() -> None:
    peak = measure.resident_peak(_build)
    assert peak is not None
    assert abs(peak - MEGABYTES * 2**20) < 16 * 2**20
    sampled = measure._sampled_peak(_fill_for_a_while)
    assert sampled > MEGABYTES * 2**20  # of the whole process


@pytest.mark.cuda
def test_peak_memory_and_time_on_a_gpu(device: torch.device) -> None:
    peak = measure.device_peak(lambda: torch.ones(MEGABYTES * 2**18, device=device), device)
    assert peak == MEGABYTES * 2**20
    assert measure.stopwatch(device)(lambda: torch.ones(2**20, device=device)) > 0


def _arguments(*given: str) -> list[str]:
    return ["graph", "--tiny", "--device", "cpu", *given]


def test_the_tiny_graph_case_from_the_command_line_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(_arguments("--no-memory", "--output", str(tmp_path)))
    (path,) = tmp_path.glob("*/graph.csv")
    found = {row.provider: row for row in table.read(path)}
    assert set(found) >= {"qaconv_triton", "qaconv_triton warm", "blocked mm + topk"}
    assert set(found) == set(graph.methods(graph.TINY, CPU))
    printed = capsys.readouterr().out
    for name, row in found.items():
        assert row.status == "ok", row
        assert row.recall == 1.0
        assert row.repeats == graph.TINY.repeats
        assert row.base == "qaconv_triton"
        assert row.op == "graph"
        assert (row.case, row.dtype, row.products) == ("600x64x9", "float32", "float32")
        assert row.lower_s <= row.median_s <= row.upper_s
        assert row.tflops == pytest.approx(600 * 599 * 64 / row.median_s / 1e12)
        useful = 4 * 600 * 64 + 600 * 9 * (4 + 8)  # the table, similarities and ids
        assert row.share_of_copy == pytest.approx(useful / row.median_s / 1e9 / row.copy_gbs)
        assert row.share_of_matmul == pytest.approx(row.tflops / row.matmul_tflops)
        assert min(row.ratio, row.copy_gbs, row.threads) > 0
        assert row.peak_bytes is None
        assert row.torch == torch.__version__
        assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|unknown", row.commit)
        assert all([row.device, row.triton, row.date])
        assert f"| {name} |" in printed
    assert found["qaconv_triton"].ratio == 1.0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_rows_carry_peak_memory() -> None:
    options = command.parser().parse_args(_arguments("--providers", "blocked", "--repeats", "1"))
    ((row,),) = graph.run(options)
    assert row.status == "ok"
    similarities = 4 * 600 * 600
    assert similarities / 2 < row.peak_bytes < similarities + 16 * 2**20


def test_rows_survive_the_file_and_replace_their_predecessors(tmp_path: Path) -> None:
    full = table.Row(
        "graph", "9x9x9", "ours", "float32", "ok", 5, 0.1, 0.09, 0.2, 1 / 3, "ours", 7, 1e-9, 0.5, 2e-9, 12.5, 1.0,
        "float32", 'a, "quoted" note', "abc1234", "2.0", "3.0", "Some CPU @ 2 GHz", 2, "2000-01-01 00:00",
        part="forward", share_of_copy=0.25,
    )  # fmt: skip
    assert all(getattr(full, field.name) != field.default for field in dataclasses.fields(full))
    wrong = table.Row("graph", "9x9x9", "theirs", "float32", "wrong: x", device=full.device, threads=2)
    (path,) = table.save([full, wrong], tmp_path)
    assert path == tmp_path / "some-cpu-2-ghz" / "graph.csv"
    assert table.read(path) == [full, wrong]
    newer = dataclasses.replace(full, median_s=0.3)
    table.save([newer], tmp_path)
    other = dataclasses.replace(full, dtype="bfloat16")
    table.save([other], tmp_path)
    assert table.read(path) == [newer, wrong, other]
    backward = dataclasses.replace(newer, part="backward")
    table.save([backward], tmp_path)
    assert table.read(path) == [newer, wrong, other, backward]


def test_files_of_before_a_column_was_there_are_read(tmp_path: Path) -> None:
    path = tmp_path / "graph.csv"
    path.write_text("op,case,provider,dtype,status,repeats\ngraph,9x9x9,ours,float32,ok,5\n", encoding="utf-8")
    assert table.read(path) == [table.Row("graph", "9x9x9", "ours", "float32", "ok", 5)]


@pytest.fixture(scope="module")
def tiny() -> tuple[graph.Case, Tensor, graph.Truth]:
    values = graph.table(graph.TINY, CPU)
    return graph.TINY, values, graph.truth(graph.TINY, values)


def test_the_truth_is_right_and_the_table_varied(tiny: tuple[graph.Case, Tensor, graph.Truth]) -> None:
    case, values, true = tiny
    wide = values.double()
    similarities = wide @ wide.T / wide.norm(dim=1) / wide.norm(dim=1, keepdim=True)
    similarities.fill_diagonal_(-math.inf)
    expected = similarities[true.rows].topk(case.k)
    assert torch.equal(true.ids, expected.indices)
    assert torch.allclose(true.values, expected.values)
    assert len(true.rows) == graph.SAMPLE
    assert torch.equal(values, graph.table(case, CPU))
    lengths = values.norm(dim=1)
    assert lengths.max() > 3 * lengths.min()
    # groups: the best neighbour is far more like a class than the typical other one
    assert true.values[:, 0].median() > similarities.clamp_min(-1).median() + 0.4


def test_the_check_sees_what_is_wrong(tiny: tuple[graph.Case, Tensor, graph.Truth]) -> None:
    case, values, true = tiny
    similarities, ids = graph._strips(case, values, 100)()
    checked = partial(graph.check, case, true, 1e-5, 1e-5)
    assert checked((similarities, ids)) == right
    assert checked((None, ids.flip(1))) == right  # a set
    row = int(true.rows[3])
    far = int(true.similarities[3].argsort()[case.k])

    def spoiled(column: int, value: float, of: Tensor) -> Tensor:
        spoilt = of.clone()
        spoilt[row, column] = value
        return spoilt

    swapped = similarities.clone()
    swapped[row, -1] = true.similarities[3, far]
    assert checked((swapped, spoiled(-1, far, ids))).wrong.startswith("neighbours that are")
    assert checked((None, spoiled(-1, far, ids))).wrong.startswith("neighbours that are")
    assert checked((None, spoiled(-1, far, ids))).recall == pytest.approx(1 - 1 / true.ids.numel())
    assert checked((similarities, spoiled(-1, far, ids))).wrong.startswith("similarities are off")
    assert checked((similarities.flip(1), ids.flip(1))).wrong.startswith("neighbours that are")
    assert checked((spoiled(0, math.nan, similarities), ids)).wrong.startswith("similarities are off by nan")
    assert checked((similarities, spoiled(0, row, ids))).wrong == "a class is its own neighbour"
    assert checked((similarities, spoiled(0, int(ids[row, 1]), ids))).wrong == "a neighbour twice in a list"
    assert checked((similarities, spoiled(0, case.classes, ids))).wrong == "ids outside [0, 600)"
    assert checked((similarities, ids[:, 1:])).wrong == "ids [600, 8] instead of [600, 9]"


@pytest.mark.parametrize("make", [graph._ours, graph._warm, graph._bf16, graph._rescored])
def test_what_a_gpu_runs_besides(
    make: Callable[[graph.Case, Tensor], Callable[[], graph.Graph]], tiny: tuple[graph.Case, Tensor, graph.Truth]
) -> None:
    case, values, true = tiny
    choice = graph.rounding(torch.float32 if make in (graph._ours, graph._warm) else torch.bfloat16, case.dim)
    value = choice if make is graph._bf16 else graph.rounding(torch.float32, case.dim)
    verdict = graph.check(case, true, choice, value, make(case, values)())
    assert verdict.wrong == ""
    assert verdict.recall > 0.9


def test_without_self_drops_the_last_where_a_class_is_not_in_its_list() -> None:
    ids = torch.tensor([[0, 1, 2], [0, 1, 2], [0, 1, 3]])
    similarities = torch.tensor([[0.9, 0.8, 0.7]]).expand(3, 3)
    kept, others = graph._without_self(similarities, ids)
    assert others.tolist() == [[1, 2], [0, 2], [0, 1]]
    assert torch.equal(kept, torch.tensor([[0.8, 0.7], [0.9, 0.7], [0.9, 0.8]]))


def test_cases_by_name_and_dtype() -> None:
    def chosen(*given: str) -> list[graph.Case]:
        options = command.parser().parse_args(["graph", "--device", "cuda", *given])
        return graph._chosen(options, torch.device(options.device))

    assert {case.dtype for case in chosen()} == {torch.bfloat16, torch.float32}
    half = chosen("--dtype", "bfloat16")
    assert {case.dtype for case in half} == {torch.bfloat16}
    assert [case.name for case in half] == list(dict.fromkeys(case.name for case in chosen()))  # each size once
    assert [case for case in chosen() if case.dtype == torch.bfloat16] == half  # which are all there in bf16
    swept = [case.classes for case in half if (case.dim, case.k) == (512, 256)]
    assert sorted(swept) == [10572, 20000, 42871, 85742]
    assert len(set(graph.CPU_CASES)) == len({case.name for case in graph.CPU_CASES}) == len(graph.CPU_CASES)
    at_64 = {case.classes for case in graph.CPU_CASES if (case.dim, case.k) == (512, 64)}
    assert at_64 == {2500, 5000, 10000, 20000, 40000, 60000}
    assert {case.k for case in graph.CPU_CASES if case.classes == 10000} == {16, 64, 256}
    assert [case.name for case in chosen("--cases", "85742x512x256", "50x8x3")] == ["85742x512x256"] * 2 + ["50x8x3"]
    for case in (*chosen(), *graph.CPU_CASES):
        for device in ("cpu", "cuda"):
            assert "qaconv_triton" in graph.methods(case, torch.device(device))
    with pytest.raises(ValueError, match="50x8x50"):
        chosen("--cases", "50x8x50")
    with pytest.raises(SystemExit):
        chosen("--cases", "50xlarge")
