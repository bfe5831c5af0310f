"""Every kernel compiles for GPUs that are not there, onto tensor cores, with wide loads and without spills.

What the compiler makes of the kernels is committed as tables: a change shows in review.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from . import report  # noqa: E402

pytestmark = pytest.mark.slow

Reports = list[report.Report]

ARCHES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")  # that for sm_89 is nearly that for sm_86: see below
TENSOR_CORE = {
    "sm_80": "HMMA", "sm_86": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma",
}  # fmt: skip
# bytes a block may have: CUDA programming guide; CDNA3 ISA guide
SHARED_LIMIT = {
    "sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536,
}  # fmt: skip
REGISTERS = {"sm": 65_536, "gfx": 4 * 64 * 512}  # of a multiprocessor; of a compute unit's four SIMDs of 64 lanes
LAUNCHES = 86
PRODUCTS = {"_forward_kernel", "_probe_gradient_kernel", "_gallery_gradient_kernel", "_append_kernel"}
PASSES = {"_norms_kernel", "_prepare_kernel", "_prepare_gradient_kernel"}  # over maps
OTHERS = {*PASSES, "_matches_kernel", "_select_kernel", "_sort_kernel"}  # no products
# memory that threads of a program pass to each other
HANDED_OVER = {
    "class path forward C=512 S=192": {"p_pooled", "p_argmax"},
    "all pairs forward C=512 S=192": {"p_pooled", "p_argmax"},
    "all pairs match C=512 S=192": {"p_pooled"},
    "compaction of": {"p_counts", "p_thresholds"},  # and p_buffers, as p_best, behind the same barrier
    "rollback of": {"p_counts", "p_thresholds"},
}
FEW_SPILLS = 16  # bytes of a thread, allowed to other versions of Triton than that which tiles are chosen with
WITH_OTHERS = "sm_90"  # the architecture whose other configurations are compared with the table, too


def run(*arguments: str) -> Any:
    # A process of its own: kernels that are interpreted in this one cannot be compiled here.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-m", "bench", "static", "--json", *arguments],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-4000:]
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Reports:
    """Of all the architectures that tests were selected for, at once: a process compiles on all cores."""
    items = (item for item in request.session.items if item.path == request.path)
    chosen = {item.callspec.params.get("arch") for item in items if hasattr(item, "callspec")}
    arches = [arch for arch in ARCHES if arch in chosen]
    alone = [arch for arch in arches if arch != WITH_OTHERS]
    rows = run("--arch", *alone) if alone else []
    if WITH_OTHERS in arches:
        rows += run("--arch", WITH_OTHERS, *(["--all-configs"] if report.committed(WITH_OTHERS) else []))
    return [report.Report(**row) for row in rows]


@pytest.fixture(params=ARCHES)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def defaults(compiled: Reports, arch: str) -> Reports:
    found = [each for each in compiled if each.arch == arch and each.is_default]
    if any("ROCm linker" in each.status for each in found):
        pytest.skip(f"Triton {triton.__version__} links AMD's code with ROCm's linker, which is not installed")
    return found


@pytest.fixture
def products(defaults: Reports) -> Reports:
    return [each for each in defaults if each.kernel in PRODUCTS]


def _without_a_table() -> None:
    """Skip, but for the version of Triton that this project is tested with: that one has a table."""
    pinned = Path(__file__).parents[2].joinpath("constraints.txt").read_text(encoding="utf-8")
    assert f"triton=={triton.__version__}\n" not in pinned, "no table: python -m bench static --save"
    kept = sorted(path.name for path in report.TABLES.parent.glob("triton-*"))
    pytest.skip(f"no table of Triton {triton.__version__}: there are {', '.join(kept)}")


def test_every_kernel_compiles_and_fits(defaults: Reports) -> None:
    assert {each.kernel for each in defaults} == {*PRODUCTS, *OTHERS}
    assert len(defaults) == LAUNCHES
    for each in defaults:
        assert "does not compile" not in each.status, each
        assert each.shared <= SHARED_LIMIT[each.arch], each
        assert each.shared > 0 or each.kernel not in PRODUCTS, each
        assert 0 < each.registers * each.threads <= REGISTERS["gfx" if "gfx" in each.arch else "sm"], each
        assert each.registers <= (512 if "gfx" in each.arch else 255), each


def test_no_spills(defaults: Reports, arch: str) -> None:
    if report.committed(arch):
        assert [each for each in defaults if each.stack or each.local] == []
    assert [each for each in defaults if each.stack > FEW_SPILLS] == []


def test_products_are_on_the_tensor_cores(products: Reports, arch: str) -> None:
    for each in products:
        # Hopper and Blackwell multiply both operands of tf32 from shared memory only where these lie along the sum
        names = ("HMMA", TENSOR_CORE[arch]) if "fp32" in each.case else (TENSOR_CORE[arch],)
        assert any(f" {name}" in f" {each.tensor_core}" for name in names), each


def test_forward_and_search_load_sixteen_bytes_at_a_time(defaults: Reports, products: Reports, arch: str) -> None:
    """Gradients read maps so, too, but pooled values and locations beside them in smaller pieces."""
    for each in products:
        if "channels first" in each.case:  # neighbours in memory are of other channels
            continue
        if arch == "gfx942":  # where maps pass through registers on their way to shared memory
            assert each.widest_load == 128, each
        else:
            assert each.async_copies, each
            if each.kernel in ("_forward_kernel", "_append_kernel"):
                assert each.narrowest_async_copy in (0, 128), each
            else:
                assert each.narrowest_async_copy >= 32, each
    assert all(each.widest_load == 128 for each in defaults if each.kernel in PASSES)


def test_threads_pass_memory_to_each_other_behind_a_barrier_only(defaults: Reports, arch: str) -> None:
    """Buffers that are compacted in place, maxima and sums over blocks of locations: on every path through the PTX."""
    for each in defaults:
        expected = next((names for case, names in HANDED_OVER.items() if each.case.startswith(case)), set())
        if arch != "gfx942":
            assert set(each.handed_over) == expected, each
        assert not each.unguarded, each


def test_the_sign_of_a_zero_is_dropped_by_integers(defaults: Reports) -> None:
    """A float addition of zero would be fused with the product before it, and an underflow stay -0."""
    for each in defaults:
        if each.kernel in ("_forward_kernel", "_append_kernel"):
            assert each.zero_additions == 0, each


@pytest.mark.skipif(
    tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6),
    reason="before 3.6 Triton's code does not name what a loop carries",
)
def test_loops_carry_what_a_later_turn_reads() -> None:
    loops = run("--loops", "--arch", WITH_OTHERS)
    assert {loop["kernel"] for loop in loops} == {*PRODUCTS, *OTHERS} - {"_sort_kernel"}  # which is unrolled
    assert [loop for loop in loops if loop["missing"]] == []


def test_nothing_differs_from_the_committed_table(compiled: Reports, arch: str) -> None:
    table = report.committed(arch)
    if not table:
        _without_a_table()
    if arch != WITH_OTHERS:
        table = [line for line in table if line["configurations"] == "default"]
    found = report.differences(table, [report.line(each) for each in compiled if each.arch == arch])
    assert not found, "\n".join([*found, f"{len(found)} differences. If they are meant: python -m bench static --save"])


def test_the_table_of_cycles_is_up_to_date() -> None:
    table = report.committed("cycles")
    if not table:
        _without_a_table()
    assert run("--cycles") == table, "python -m bench static --cycles --save, then python -m bench report"


def test_the_table_of_sm_89_keeps_what_that_of_sm_86_does() -> None:
    """Of the two one is compiled here; instructions and registers of few kernels differ."""
    if not report.committed("sm_86"):
        _without_a_table()
    names = ("configurations", "case", "kernel", "configuration", "status", "stack", "local", "tensor_core")
    kept = [[[line[name] for name in names] for line in report.committed(arch)] for arch in ("sm_86", "sm_89")]
    assert kept[0] == kept[1]


def test_differences_name_row_and_column() -> None:
    same = {"case": "a", "configurations": "default", "configuration": "BS=64", "registers": "9"}
    other = {"case": "b", "configurations": "other", "configuration": "BS=32", "registers": "9"}
    assert report.differences([same, other], [same, other]) == []
    assert report.differences([same, other], [same | {"registers": "10", "configuration": "BS=32"}]) == [
        "a default: configuration: BS=64 -> BS=32",
        "a default: registers: 9 -> 10",
        "b BS=32: is gone",
    ]
    assert report.differences([same], [same, other]) == ["b BS=32: is new"]


def test_a_new_batch_size_compiles_nothing() -> None:
    """Nor do a new number of classes or K.

    Sizes are 1, multiples of 16, and neither, which Triton tells apart where it specialises integers.

    Buffers are selected from, and sorted, in powers of two (BL and BK), so that short ones cost little: a K in the
    next power of two is compiled for. Of these kernels, launches of one length each are compared.
    """
    keys = run("--sizes")
    assert len(keys) == LAUNCHES
    several = {case: found for case, found in keys.items() if len(found) > 1}
    assert not several, json.dumps(several, indent=1)
