"""A process and its torchrun are killed; the other one goes on alone from the last checkpoint, with the same losses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("elastic.py")
# Of a node that is gone the other hears after 3 intervals; then it waits for more to come until the last call.
SETTINGS = "store_type=file,keep_alive_interval=2,last_call_timeout=2"


def start(folder: Path, *options: str, **environment: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPT), str(folder)]
    everything = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    errors = folder / f"errors{environment.get('IS_VICTIM', '')}"
    with errors.open("w") as file:  # no pipe: one that is not read stops its process when it is full
        return subprocess.Popen(command, env=everything, stderr=file)


def losses(folder: Path) -> list[tuple[int, int, float]]:
    """Ranks, step and loss."""
    lines = (line.split() for line in (folder / "losses").read_text().splitlines())
    return [(int(ranks), int(step), float(loss)) for ranks, step, loss in lines]


@pytest.mark.slow
def test_a_training_goes_on_with_the_processes_that_are_left(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3", "--local-addr", "127.0.0.1"]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", str(tmp_path / "store"), "--rdzv-conf", SETTINGS]
    started = [
        start(whole, "--standalone", "--nproc-per-node", "2"),
        start(parts, *options, NODES="2"),
        start(parts, *options, NODES="2", IS_VICTIM="1"),
    ]
    try:
        for torchrun, expected_code in zip(started, (0, 0, -signal.SIGKILL), strict=True):
            code = torchrun.wait(timeout=240)
            assert code == expected_code, [path.read_text()[-4000:] for path in tmp_path.glob("*/errors*")]
    finally:
        for torchrun in started:
            torchrun.terminate()  # it ends its processes
            torchrun.wait()
    expected, found = losses(whole), losses(parts)
    assert [(ranks, step) for ranks, step, _ in found] == [(2 if step < 4 else 1, step) for step in range(8)]
    assert [loss for *_, loss in found] == pytest.approx([loss for *_, loss in expected], rel=1e-9)
