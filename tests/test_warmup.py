"""The warm-up compiles and tunes ahead of a training: `python -m qaconv_triton.warmup`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import torch_default

from qaconv_triton import warmup

pytest.importorskip("triton")
from fake_launches import CONFIGS

from qaconv_triton.kernels import tuning

MODEL = ["--channels", "16", "--height", "3", "--width", "2", "--num-classes", "20", "--k-nearest", "5"]


def run_warmup(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qaconv_triton.warmup", *MODEL, "--batch-size", "4", *options]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QACONV_", "TRITON_INTERPRET"))}
    return subprocess.run(command, env=kept | variables, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_warm_up_runs_everything_and_reports(tmp_path: Path) -> None:
    interpreted = {"TRITON_INTERPRET": "1", "QACONV_TRITON_BACKEND": "triton", "QACONV_TRITON_CACHE_DIR": str(tmp_path)}
    run = run_warmup("--device", "cpu", "--dtype", "bfloat16", QACONV_TRITON_TUNE="1", **interpreted)
    assert run.returncode == 0, run.stderr
    for name in ("class graph", "class path", "all pairs", "matching", "matching of pairs"):
        assert f"{name}" in run.stdout
    assert "No launch is large enough to be tuned for" in run.stdout
    assert "5 of 5 operations" in run.stderr
    assert "\r" not in run.stderr  # no progress bar in a log


@pytest.mark.parametrize(
    ("wanted", "home", "said"),
    [
        ("0", True, "(QACONV_TRITON_TUNE='0'): kernels run with the defaults"),
        ("1", True, "Choices are kept in /somewhere."),
        ("1", False, "for this process only: no home directory"),
    ],
)
def test_the_warm_up_prints_where_selections_are_kept(
    wanted: str, home: bool, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(tuning, "INTERPRETED", True)
    monkeypatch.setattr(tuning, "selected", {("table", (49,), "tf32", 0): CONFIGS[1]})
    monkeypatch.setattr(tuning, "cache_directory", lambda: Path("/somewhere") if home else None)
    monkeypatch.setattr(warmup, "_steps", lambda options, device: iter([("step", lambda: None)]))
    monkeypatch.setattr(warmup.ops, "uses_triton", lambda device, dtype: True)
    monkeypatch.setenv(tuning.TUNE_VARIABLE, wanted)
    warmup.main([*MODEL, "--device", "cpu"])
    printed = capsys.readouterr()
    assert said in printed.out
    assert "table (49,) tf32" in printed.out
    assert "warm-up: 100%, 1 of 1 operations" in printed.err


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_warm_up_is_in_fp32_whatever_the_default_dtype(
    default: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "torch")
    seen: list[torch.Tensor] = []

    class Recorded(warmup.QAConv):
        def forward(self, *inputs: torch.Tensor, **more: Any) -> torch.Tensor:
            seen.extend([self.class_embed, self.fc.weight, inputs[0]])
            return super().forward(*inputs, **more)

    monkeypatch.setattr(warmup, "QAConv", Recorded)
    options = warmup.parser().parse_args([*MODEL, "--batch-size", "4", "--device", "cpu", "--dtype", "float32"])
    with torch_default(default):
        dict(warmup._steps(options, options.device))["all pairs of 4, float32"]()
    assert {tensor.dtype for tensor in seen} == {torch.float32}


def test_the_warm_up_has_nothing_to_do_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    warmup.main([*MODEL, "--device", "cpu"])
    assert "nothing to compile or tune" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--k-nearest", "20", "k_nearest must be between 1 and 19"),
        ("--height", "0", "height must be at least 1"),
        ("--channels", "-3", "num_features must be at least 1"),
        ("--batch-size", "0", "--batch-size must be positive, got 0"),
    ],
)
def test_the_warm_up_refuses_impossible_sizes(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        warmup.main([*MODEL, option, value])
    assert said in capsys.readouterr().err
