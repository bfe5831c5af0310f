"""Every kernel compiles for GPUs that are not there, onto tensor cores, with wide loads and without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ARCHES = (80, 90, 100)
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may have, CUDA programming guide
PRODUCTS = {"_forward_kernel", "_probe_gradient_kernel", "_gallery_gradient_kernel", "_append_kernel"}
OTHERS = {"_norms_kernel", "_select_kernel", "_order_kernel"}  # no products


@pytest.fixture(scope="module", params=ARCHES)
def reports(request: pytest.FixtureRequest) -> list[dict]:
    # A process of its own: kernels that are interpreted in this one cannot be compiled here.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "bench.static", "--json", "--arch", str(request.param)],
        cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def products(reports: list[dict]) -> list[dict]:
    return [row for row in reports if row["kernel"] in PRODUCTS]


def test_every_kernel_compiles_and_fits(reports: list[dict]) -> None:
    kernels = {row["kernel"] for row in reports}
    assert kernels == {*PRODUCTS, *OTHERS}
    assert len(reports) == 52
    for row in reports:
        assert 0 < row["shared"] <= SHARED_LIMIT[row["arch"]], row
        assert 0 < row["registers"] * row["threads"] <= 65_536, row


def test_no_spills(reports: list[dict]) -> None:
    spilled = [row for row in reports if row["stack"] or row["opcodes"]["LDL"] or row["opcodes"]["STL"]]
    assert spilled == []


def test_products_are_on_the_tensor_cores(reports: list[dict]) -> None:
    for row in products(reports):
        names = ("HMMA", TENSOR_CORE[row["arch"]]) if "fp32" in row["case"] else (TENSOR_CORE[row["arch"]],)
        assert any(row["opcodes"][name] for name in names), row


def test_maps_are_loaded_sixteen_bytes_at_a_time(reports: list[dict]) -> None:
    for row in products(reports):
        assert row["opcodes"]["LDGSTS"] or row["opcodes"]["UTMALDG"], row
        if "forward" in row["case"] or row["kernel"] == "_append_kernel":
            assert row["narrowest_async_load"] in (0, 128), row
    assert all(row["widest_load"] == 128 for row in reports if row["kernel"] == "_norms_kernel")
