"""The benchmarks' page, from made-up rows whose numbers are known, and the committed one from the committed rows."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import plots, report, table
from bench.table import Row

OURS, OTHER = "qaconv_triton", "blocked mm + topk"
CPU, GPU = "Some CPU", "NVIDIA H100 80GB HBM3"


def _row(op: str, case: str, provider: str = OURS, seconds: float | None = 0.2, **changes: object) -> Row:
    """A row of 3 rounds: half the product's ceiling of 1 TFLOP/s, a tenth of the copy's 10 GB/s."""
    row = Row(
        op, case, provider, "float32", "ok", 3, seconds, 0.1, 0.4, 1.0, OURS, 5_000_000, 0.5, 1.0, 0.5, 10.0, None,
        "float32", "", "abc1234", "2.0", "3.0", CPU, 2, "2001-02-03 04:05", share_of_copy=0.1,
    )  # fmt: skip
    return replace(row, **changes)


def _bad(row: Row, status: str) -> Row:
    """The same, of a provider that has no numbers."""
    nothing = dict.fromkeys(
        ("repeats", "median_s", "lower_s", "upper_s", "ratio", "peak_bytes", "tflops", "share_of_matmul"), None
    )
    return replace(row, status=status, share_of_copy=None, **nothing)


def _graph_sweep(device: str = CPU) -> list[Row]:
    """Against N at K=4, of three sizes and two providers; a fourth size at another K, and two providers too few."""
    sizes = {100: 0.001, 200: 0.004, 400: 0.016}
    found = [_row("graph", f"{size}x8x4", OURS, time, device=device) for size, time in sizes.items()]
    found += [_row("graph", f"{size}x8x4", OTHER, 2 * time, ratio=2.0, device=device) for size, time in sizes.items()]
    found = [replace(row, lower_s=0.9 * row.median_s, upper_s=1.2 * row.median_s) for row in found]
    found[-1] = _bad(found[-1], "failed: MemoryError: no | room")
    found += [_row("graph", f"{size}x8x4", "too few", 1.0, device=device) for size in (100, 200)]
    return [*found, _row("graph", "800x8x5", device=device), _row("graph", "800x8x5", OTHER, device=device)]


def _page(found: Iterable[Row], results: Path) -> tuple[str, report.Drawings]:
    table.save(found, results)
    return report.page(results)


def _lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def _chosen(line: str) -> set[tuple[str, str, str]]:
    """Case, dtype and part that a printed command measures."""
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "bench"]
    options = command.parser().parse_args(words[3:])
    cases = importlib.import_module(command.OPS[options.op])._chosen(options, torch.device(options.device))
    return {
        (case.name, str(case.dtype).removeprefix("torch."), part)
        for case in cases
        for part in (case.parts if hasattr(case, "parts") else [""])
    }


def test_a_case_has_its_numbers_its_command_and_its_versions(tmp_path: Path) -> None:
    ours = _row("graph", "90x16x8", seconds=0.25, share_of_matmul=0.51)
    other = _row("graph", "90x16x8", OTHER, 1.5, ratio=6.25, recall=0.5, note="slow")
    text, drawings = _page([ours, other], tmp_path)
    assert text.startswith("# Benchmarks\n")
    assert f"## {CPU}\n" in text
    assert "#### 90x16x8, float32, 2 threads\n\nN=90, D=16, K=8.\n" in text
    assert "```sh\npython -m bench graph --cases 90x16x8 --dtype float32 --device cpu --threads 2\n```\n" in text
    around = "2 threads, torch 2.0, triton 3.0, commit abc1234, 2001-02-03 04:05 UTC."
    assert f"{around} In the same run: torch.mm float32 1 TFLOP/s, copy 10 GB/s.\n" in text
    assert "| qaconv_triton | 250 ms | 100 ms to 400 ms | 3 | 1.00 | 5.0 | 0.5 | 51% | 10% |  |  |" in text
    assert (
        f"| {OTHER} | 1.5 s | 100 ms to 400 ms | 3 | 6.25 | 5.0 | 0.5 | 50% | 10% | 0.50000 | slow |"
        in text.splitlines()
    )
    assert f"| graph 90x16x8 float32 | 250 ms | 5.0 | {OTHER}: 6.25 ×, 5.0 MB |" in text.splitlines()
    assert list(drawings) == ["benchmarks/some-cpu/roofline.png"]


def test_what_is_wrong_or_failed_has_no_number(tmp_path: Path) -> None:
    wrong = _bad(_row("graph", "90x16x8", "liar"), "wrong: off by 3")
    failed = _bad(_row("graph", "90x16x8", "raiser"), "failed: TypeError: int | None")
    text, _ = _page([_row("graph", "90x16x8"), wrong, failed], tmp_path)
    assert _lines(text, "| liar") == ["| liar |  |  |  |  |  |  |  |  | wrong: off by 3 |"]
    assert _lines(text, "| raiser") == ["| raiser |  |  |  |  |  |  |  |  | failed: TypeError: int \\| None |"]
    assert _lines(text, "| graph") == ["| graph 90x16x8 float32 | 200 ms | 5.0 | liar: wrong<br>raiser: failed |"]


def test_a_sweep_is_found_drawn_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, output = tmp_path / "results", tmp_path / "docs"
    table.save(_graph_sweep(), results)
    stale = output / "benchmarks" / "some-cpu" / "stale.png"
    stale.parent.mkdir(parents=True)
    stale.touch()
    report.main(["--results", str(results), "--output", str(output)])
    assert "3 plots" in capsys.readouterr().out
    names = ["graph-float32-2-threads-memory-by-N.png", "graph-float32-2-threads-time-by-N.png", "roofline.png"]
    assert sorted(path.name for path in stale.parent.iterdir()) == names
    text = (output / "benchmarks.md").read_text(encoding="utf-8")
    for name in names:
        assert (stale.parent / name).read_bytes().startswith(b"\x89PNG")
        assert f"(benchmarks/some-cpu/{name})" in text
    assert "#### Against N, float32, 2 threads\n\nD=8, K=4.\n" in text
    assert "bench graph --cases 100x8x4 200x8x4 400x8x4 --dtype float32 --device cpu --threads 2\n" in text
    assert "Medians of 3 rounds" in text
    shown = f"""| N | qaconv_triton | qaconv_triton, MB | {OTHER} | {OTHER}, MB |
| --- | --- | --- | --- | --- |
| 100 | 1 ms | 5.0 | 2 ms | 5.0 |
| 200 | 4 ms | 5.0 | 8 ms | 5.0 |
| 400 | 16 ms | 5.0 | failed |  |

- 400x8x4, {OTHER}: failed: MemoryError: no | room
"""
    assert shown in text
    # the points of the sweep have no tables of their own, but where there is more to say
    assert re.findall(r"^#### (\d\S+),", text, re.MULTILINE) == ["100x8x4", "200x8x4", "800x8x5"]


def test_the_longest_sweep_of_an_axis_of_three_sizes_at_least() -> None:
    at_4 = [_row("graph", f"{size}x8x4") for size in (100, 200, 400)]
    at_5 = [_row("graph", f"{size}x8x5") for size in (50, 100, 200, 400)]
    (sweep,) = plots.sweeps([*at_4, *reversed(at_5)])
    assert (sweep.axis, sweep.fixed, sweep.held) == ("N", (8, 5), "D=8, K=5")
    assert sweep.points == {OURS: dict(zip((50, 100, 200, 400), at_5, strict=True))}
    assert plots.sweeps(at_4[:2]) == []
    assert plots.sweeps([*at_4[:2], _bad(at_4[2], "wrong: x")]) == []  # two numbers make no course
    assert plots.sweeps([*at_4[:2], replace(at_4[2], dtype="bfloat16")]) == []
    assert plots.sweeps([*at_4[:2], replace(at_4[2], threads=1)]) == []
    both = plots.sweeps([*at_4, *(_row("graph", f"100x8x{k}") for k in (5, 6))])
    assert {sweep.axis: len(sweep.rows) for sweep in both} == {"N": 3, "K": 3}
    step = [_row("classes", f"8x{count}x4x2x2x2x1", part="step") for count in (30, 60, 90)]
    assert [(sweep.axis, sweep.part) for sweep in plots.sweeps(step)] == [("N", "step")]


def test_points_of_the_roofline_are_the_library_s_with_both_shares() -> None:
    point = _row("pairs", "8x9x4x2x2", part="match")
    others = [
        replace(point, provider=OTHER),
        replace(point, share_of_copy=None),
        replace(point, share_of_matmul=None),
        _bad(point, "wrong: x"),
    ]
    assert plots.under_the_roof([*others, point]) == [point]
    assert plots.intensity(point) == pytest.approx(0.5e12 / 1e9)
    ceilings = [replace(point, copy_gbs=gbs, matmul_tflops=tflops) for gbs, tflops in ((10, 1), (30, 9), (20, 2))]
    assert plots.roof([*ceilings, replace(point, products="bfloat16", copy_gbs=20, matmul_tflops=4)]) == (
        20e9,
        {"bfloat16": 4e12, "float32": 2e12},
    )


def test_no_roofline_without_points(tmp_path: Path) -> None:
    text, drawings = _page([_row("graph", "90x16x8", share_of_copy=None)], tmp_path)
    assert drawings == {}
    assert "Roofline" not in text


def test_a_gpu_not_measured_is_said_until_it_is(tmp_path: Path) -> None:
    said = "GPU figures are **not measured yet**"
    text, _ = _page([_row("graph", "90x16x8"), replace(_row("graph", "90x16x8"), device="AMD EPYC 7763")], tmp_path)
    assert said in text
    assert "\nmake gpu-check\npython -m bench --device cuda\n" in text
    text, drawings = _page(_graph_sweep(GPU), tmp_path)
    assert "measured yet" not in text
    assert text.index(f"## {GPU}") < text.index("## AMD EPYC 7763") < text.index(f"## {CPU}")
    assert "bench graph --cases 800x8x5 --dtype float32 --device cuda\n" in text  # threads are no matter there
    assert "benchmarks/nvidia-h100-80gb-hbm3/graph-float32-time-by-N.png" in drawings


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (GPU, True), ("Tesla T4", True), ("AMD Instinct MI300X", True), ("AMD EPYC 7763 64-Core Processor", False),
        ("AMD Ryzen 7 5800U with Radeon Graphics", False), ("Intel(R) Xeon(R) Processor", False),
    ],
)  # fmt: skip
def test_gpus_are_known_by_name(device: str, expected: bool) -> None:
    assert table.of_gpu(replace(_row("graph", "9x9x3"), device=device)) is expected


def test_an_unknown_op_is_a_plain_table(tmp_path: Path) -> None:
    rows = [_row("other", case, share_of_copy=None, seconds=seconds) for case, seconds in (("a b", 2.5), ("c", 0.5))]
    text, drawings = _page(rows, tmp_path)
    assert drawings == {}
    section = text[text.index("### `other`") :]
    assert "2 threads, torch 2.0" in section
    assert _lines(section, "| a b")[0].startswith("| a b | qaconv_triton | 2.5 s |")
    assert _lines(section, "| c |")[0].startswith("| c | qaconv_triton | 500 ms |")
    assert "python -m bench" not in section
    compiled, _ = _page([_row("compile", "first call", share_of_copy=None)], tmp_path / "compiled")
    assert "python -m bench static --times" in compiled[compiled.index("### `compile`") :]


def test_rows_of_several_runs_say_so(tmp_path: Path) -> None:
    later = _row("graph", "90x16x8", OTHER, commit="def5678", matmul_tflops=1.5, copy_gbs=1234.5)
    text, _ = _page([_row("graph", "90x16x8"), later], tmp_path)
    assert "commit abc1234 and def5678" in text
    assert "torch.mm float32 1 to 1.5 TFLOP/s, copy 10 to 1,234 GB/s" in text


def test_a_long_summary_keeps_one_dtype_of_a_case() -> None:
    groups = []
    for number in range(report.SUMMARY // 2 + 1):
        for dtype in ("bfloat16", "float32"):
            row = _row("graph", f"{90 + number}x16x8", dtype=dtype)
            groups.append([row, replace(row, provider=OTHER)])
    few = report._summary(groups[:4])
    assert [line.split(" | ")[0] for line in few.splitlines()[2:]] == [
        f"| graph {size}x16x8 {dtype}" for size in (90, 91) for dtype in ("bfloat16", "float32")
    ]
    many = report._summary(groups)
    assert [line.split(" | ")[0] for line in many.splitlines()[2:]] == [
        f"| graph {90 + number}x16x8 bfloat16" for number in range(report.SUMMARY // 2 + 1)
    ]


def test_the_summary_is_of_whole_cases_and_of_others() -> None:
    def groups(part: str) -> list[list[Row]]:
        row = _row("pairs", "8x8x4x2x2", part=part)
        return [[row, replace(row, provider="eager", ratio=3.0)], [replace(row, case="9x9x4x2x2")]]

    assert report._summary(groups("forward")) == report._summary(groups("backward")) == ""
    assert report._summary(groups("step")).splitlines()[2:] == [
        "| pairs 8x8x4x2x2 step float32 | 200 ms | 5.0 | eager: 3.00 ×, 5.0 MB |"
    ]
    own = _row("pairs", "8x8x4x2x2", part="step")
    assert report._summary([[own, replace(own, provider=f"{OURS}, sparse_grad")]]) == ""


@pytest.mark.parametrize(
    ("op", "case", "part", "dtype", "device"),
    [
        ("graph", "20000x512x256", "", "float32", CPU),
        ("graph", "20000x512x256", "", "bfloat16", GPU),
        ("graph", "42871x512x256", "", "bfloat16", GPU),
        ("graph", "77x5x3", "", "float64", CPU),
        ("classes", "64x10000x256x512x7x7x4", "step", "bfloat16", CPU),
        ("classes", "64x2000x64x512x7x7x4", "step", "float32", CPU),
        ("classes", "64x2000x64x512x7x7x4", "forward", "float32", CPU),
        ("classes", "256x21144x256x512x7x7x4", "step", "bfloat16", GPU),
        ("pairs", "64x1000x512x7x7", "match", "float32", CPU),
        ("pairs", "64x64x512x7x7", "backward", "float16", GPU),
    ],
)
def test_a_command_selects_its_rows(op: str, case: str, part: str, dtype: str, device: str) -> None:
    row = _row(op, case, part=part, dtype=dtype, device=device)
    assert _chosen(report.command([row])) == {(case, dtype, part)}
    sizes = case.split("x")
    other = "x".join([sizes[0], str(int(sizes[1]) + 1), *sizes[2:]])
    both = report.command([row, replace(row, case=other)])
    assert _chosen(both) == {(case, dtype, part), (other, dtype, part)}


def test_the_same_rows_give_the_same_page(tmp_path: Path) -> None:
    results = tmp_path / "results"
    table.save([*_graph_sweep(), *_graph_sweep(GPU)], results)
    first, second = tmp_path / "first", tmp_path / "second"
    for output in (first, second):
        report.main(["--results", str(results), "--output", str(output)])
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 7
    for path in files:
        assert (first / path).read_bytes() == (second / path).read_bytes(), path


def test_the_committed_page_is_that_of_the_committed_rows() -> None:
    text, drawings = report.page(table.RESULTS)
    advice = "docs/ is not what bench/results gives: run `python -m bench report`"
    assert (report.DOCS / report.PAGE).read_text(encoding="utf-8") == text, advice
    there = {path.relative_to(report.DOCS).as_posix() for path in (report.DOCS / report.PICTURES).rglob("*.png")}
    assert there == set(drawings), advice
    found = {}
    for path in table.RESULTS.glob("*/*.csv"):
        for row in table.read(path):
            found.setdefault((row.op, row.case, row.dtype, row.part), []).append(row)
    for (op, case, dtype, part), rows in found.items():
        if op in command.OPS:
            assert _chosen(report.command(rows)) == {(case, dtype, part)}
    printed = [line for line in text.splitlines() if line.startswith("python -m bench ") and "--cases" in line]
    assert {each for line in printed for each in _chosen(line)} == {key[1:] for key in found if key[0] in command.OPS}
