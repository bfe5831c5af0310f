"""The examples of training scripts, run as a user runs them: alone, interrupted and continued, on two processes."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
TORCHRUN = [*RANKS, "2", "tests/run_example.py"]


def run(*arguments: str | Path) -> str:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def losses(printed: str) -> list[str]:
    return re.findall(r"epoch \d+ loss [\d.]+", printed)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[], TORCHRUN], ids=["one process", "two processes"])
def test_the_plain_loop_goes_on_where_it_was_interrupted(ranks: list[str], tmp_path: Path) -> None:
    """Inside the first epoch, and at its end."""
    loop = [*ranks, "examples/train_loop.py", "--checkpoint"]
    whole = losses(run(*loop, tmp_path / "whole.pt"))
    batches = 12 if ranks else 24  # of a process in an epoch
    assert len(whole) == 2 * batches
    assert float(whole[-1].split()[-1]) < float(whole[0].split()[-1])
    parts = run(*loop, tmp_path / "parts.pt", "--stop-after", "7")
    parts += run(*loop, tmp_path / "parts.pt", "--stop-after", str(batches - 7))
    parts += run(*loop, tmp_path / "parts.pt")
    assert losses(parts) == whole


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of torchrun in /proc")
def test_a_sharded_table_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    """One process is killed, and the other ends too. On as many again the losses are those of a training that was not
    interrupted; on another number, whose batches differ, it goes on as well.
    """
    script = ["examples/train_sharded.py", "--checkpoint"]
    whole = losses(run(*TORCHRUN, *script, tmp_path / "whole", "--epochs", "3"))
    assert len(whole) == 3
    assert float(whole[-1].split()[-1]) < 0.5 * float(whole[0].split()[-1])
    command = [sys.executable, *TORCHRUN, *script, str(tmp_path / "parts"), "--epochs", "300"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as torchrun:
        assert torchrun.stdout is not None
        printed = list(islice((line for line in torchrun.stdout if line.startswith("epoch")), 2))
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert torchrun.wait(timeout=60) != 0
    assert losses("".join(printed)) == whole[:2]
    for epoch in range(2, 300):  # what was saved after the second line
        shutil.rmtree(tmp_path / "parts" / str(epoch), ignore_errors=True)
    assert losses(run(*TORCHRUN, *script, tmp_path / "parts", "--epochs", "3")) == whole[1:]
    alone = losses(run(*RANKS, "1", *script, tmp_path / "whole", "--epochs", "4"))
    assert len(alone) == 1
    assert float(alone[0].split()[-1]) < float(whole[-1].split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[], TORCHRUN], ids=["one process", "two processes"])
def test_accelerate(ranks: list[str]) -> None:
    pytest.importorskip("accelerate")
    found = losses(run(*ranks, "examples/train_accelerate.py", "--cpu", "--mixed-precision", "bf16"))
    assert len(found) == 2
    assert float(found[1].split()[-1]) < float(found[0].split()[-1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_a_backbone_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    try:
        importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # torchvision of another build than torch's: operators are missing
        pytest.skip(f"timm: {error}")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    script, pictures = importlib.import_module("train_lightning"), importlib.import_module("test_images")
    arguments = [*pictures.save_list(tmp_path / "data"), "--backbone", "mobilenetv3_small_050", "--size", "64x32"]
    arguments += ["--stride", "16", "--features", "12", "--batch-size", "8", "--instances", "2", "--k_nearest", "3"]
    arguments += ["--accelerator", "cpu", "--output", str(tmp_path / "out"), "--epochs", "2"]
    trainer = script.main(arguments)
    assert trainer.global_step > 0
    assert trainer.callback_metrics["loss"].isfinite()
    assert 0 <= trainer.callback_metrics["Rank-1"] <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning, about settings that a small run needs
def test_lightning_finds_unseen_identities_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lightning")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    script, pictures = importlib.import_module("train_lightning"), importlib.import_module("test_images")
    arguments = [*pictures.save_list(tmp_path / "data"), "--size", "16", "--stride", "4", "--features", "8"]
    arguments += ["--batch-size", "8", "--instances", "2", "--k_nearest", "3", "--accelerator", "cpu"]
    arguments += ["--output", str(tmp_path / "out"), "--epochs"]
    steps = script.main([*arguments, "6"]).global_step
    printed = capsys.readouterr().out
    assert float(re.findall(r"'Rank-1': ([\d.]+)", printed)[-1]) >= 0.75  # chance is an eighth
    assert "'graph/changed'" in printed
    again = script.main([*arguments, "6"])  # there is a checkpoint of the end: nothing is left to do
    assert again.ckpt_path == tmp_path / "out" / "last.ckpt"
    assert again.global_step == steps > 0
