"""A training of a sharded table that torchrun restarts with fewer processes; run by test_elastic.py.

Every batch is one of all ranks, of which each takes its part: batches do not depend on the number of ranks, nor does
the class loss. The code is that of docs/many-devices.md, in fp64.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from sharded_cases import docs_code
from torch import distributed, nn

from qaconv_triton import GraphSampler, QAConv, SoftmaxTripletLoss

STEPS, KILLED_AT = 8, 4
NUM_CLASSES = 25
LABELS = torch.arange(NUM_CLASSES).repeat_interleave(6)


def make_criterion(num_classes: int, mesh: Any) -> SoftmaxTripletLoss:
    return SoftmaxTripletLoss(QAConv(6, 2, 2, num_classes, 7, mesh=mesh))


def main(folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    is_victim, has_failed = "IS_VICTIM" in os.environ, folder / "failed"
    while "NODES" in os.environ and ranks < int(os.environ["NODES"]) and not has_failed.exists():
        time.sleep(0.1)  # torchrun starts this process again when the other has come

    torch.manual_seed(0)
    images = torch.randn(len(LABELS), 3, 8, 8)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Conv2d(8, 6, 1))
    docs = docs_code()
    docs["make_criterion"] = make_criterion
    trained, criterion, optimizer, sampler = docs["build"](backbone, LABELS, NUM_CLASSES, "cpu")
    model = nn.ModuleDict({"backbone": backbone, "criterion": criterion})
    sampler = GraphSampler(LABELS, sampler.neighbors, batch_size=32, num_instances=4, num_replicas=1, rank=0)
    saved = [int(path.parent.name) for path in folder.glob("*/.metadata")]
    if saved:
        docs["load"](model, optimizer, folder / str(max(saved)))
    for step in range(max(saved, default=0), STEPS):
        if is_victim and step == KILLED_AT:
            has_failed.touch()
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        sampler.set_epoch(step)
        batch = next(iter(sampler))[rank::ranks]  # after a search of the class graph
        loss = criterion(trained(images[batch]), LABELS[batch])[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / ranks
        distributed.all_reduce(mean)
        docs["save"](model, optimizer, folder / str(step + 1))
        if rank == 0:
            with (folder / "losses").open("a") as losses:
                losses.write(f"{ranks} {step} {mean.item()!r}\n")
    distributed.barrier()
    os._exit(0)  # gloo may abort if it is torn down after a checkpoint


main(Path(sys.argv[1]))
