"""A sharded class table: seconds on processes beside the model's, and the model's figures for GPUs.

    python -m bench scale               1, 2 and 4 gloo processes; writes both sections of docs/many-devices.md
    python -m bench scale --computed    the computed section alone

What is computed, and how, is in scale_model.py.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from qaconv_triton import QAConv

from . import measure, results
from .report import DOCS
from .scale_model import (
    Job,
    Machine,
    adamw_bytes,
    fetched_bytes,
    graph_messages,
    graph_seconds,
    memory,
    sampler_bytes,
    step_messages,
    step_seconds,
)

# Assumptions about GPUs; none was measured with this code.
GPU_FLOPS = 600e12  # FLOP/s of a graph's bf16 products; a large torch.mm reaches 800e12 on an H100
GPU_COPY = 3.0e12  # bytes/s of its memory
GPU_BYTES = 80e9  # of its memory
NODE = 8  # GPUs
NVLINK, INFINIBAND = 450e9, 50e9  # bytes/s that a GPU receives in a job of one node; of several
GPU_LATENCY = 50e-6  # seconds of a message or collective
GPUS, CLASSES = (8, 64, 256, 1024), (10**6, 10**7, 10**8)
INSTANCES = 4  # samples of a class in a batch

SIZES = "NxCxHxWxKxB"  # of a case: classes, maps, neighbours, samples of a rank
CASES = ("2048x512x7x7x20x64", "4096x64x7x7x20x64")
MATMUL_SIZE, COPY_BYTES, MESSAGE_BYTES, SMALL_MESSAGES = 1536, 2**27, 2**23, 20  # by which rates are measured
SECTION = "<!-- python -m bench scale: {} -->\n\n{}\n\n<!-- end -->"


def main(arguments: list[str] | None = None) -> None:
    """Measure, compute, print, and write the page."""
    parser = argparse.ArgumentParser("python -m bench scale", description=__doc__.partition("\n")[0])
    parser.add_argument("--computed", action="store_true", help="measure nothing")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="SIZE", help=f"{SIZES} on each of the processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="(1 2 4)")
    parser.add_argument("--rounds", type=int, default=5, help="(5)")
    parser.add_argument("--page", type=Path, default=DOCS / "many-devices.md", help="where the sections are replaced")
    options = parser.parse_args(arguments)
    sections = {"computed": computed_section()}
    if not options.computed:
        sections["measured"] = measured_section(options.cases, options.processes, options.rounds)
    page = options.page.read_text(encoding="utf-8")
    for name, text in sections.items():
        print(text, end="\n\n")
        pattern = re.escape(SECTION.format(name, "TEXT")).replace("TEXT", ".*?")
        found = re.findall(pattern, page, flags=re.DOTALL)
        if len(found) != 1:
            raise ValueError(f"{options.page}: expected one section {SECTION.format(name, '...')!r}, got {len(found)}")
        page = page.replace(found[0], SECTION.format(name, text))
    options.page.write_text(page, encoding="utf-8")


def measured(job: Job, rounds: int) -> list[tuple[Machine, float, float]]:
    """Rates, seconds of a graph and of a step, in turn, on gloo processes of one thread each, after a warm-up."""
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(_work, (job, rounds, folder), nprocs=job.ranks)
        found = json.loads((Path(folder) / "rounds.json").read_text(encoding="utf-8"))
    return [(Machine(*machine), graph, step) for machine, graph, step in found[1:]]


def _work(rank: int, job: Job, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=job.ranks)
    mesh, maps = init_device_mesh("cpu", (job.ranks,)), (job.channels, job.height, job.width)
    matcher = QAConv(*maps, job.classes, job.k, include_self=True, mesh=mesh)
    optimizer = torch.optim.AdamW([matcher.class_embed], fused=True)
    generator = torch.Generator().manual_seed(rank)
    features = torch.randn(job.batch, *maps, generator=generator).requires_grad_()
    classes = torch.randint(job.classes, (-(-job.batch // INSTANCES),), generator=generator)
    labels = classes.repeat_interleave(INSTANCES)[: job.batch]

    def step() -> None:
        optimizer.zero_grad()
        matcher.class_scores(features, labels).values.square().mean().backward()
        optimizer.step()

    found = [
        (_rates(rank, job.ranks), _seconds(matcher.compute_class_neighbors), _seconds(step)) for _ in range(rounds + 1)
    ]
    if rank == 0:
        (Path(folder) / "rounds.json").write_text(json.dumps(found), encoding="utf-8")
    distributed.barrier()
    os._exit(0)  # gloo may abort at a usual exit


def _rates(rank: int, ranks: int) -> Machine:
    """Of products and copies while one rank works alone, shared by the ranks of a core; of messages of all at once."""
    left, right = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE)
    source, target = torch.zeros(2, COPY_BYTES, dtype=torch.uint8)
    message, number = source[:MESSAGE_BYTES], torch.zeros(1)
    arriving = [torch.zeros_like(message) for _ in range(ranks)]
    product, copy = (
        _seconds(call if rank == 0 else lambda: None)
        for call in (partial(torch.mm, left, right), partial(target.copy_, source))
    )
    share = min(1.0, (os.cpu_count() or 1) / ranks)
    small = _seconds(lambda: [distributed.all_reduce(number) for _ in range(SMALL_MESSAGES)]) / SMALL_MESSAGES
    large = _seconds(lambda: distributed.all_gather(arriving, message)) / (MESSAGE_BYTES * max(ranks - 1, 1))
    return Machine(share * 2 * MATMUL_SIZE**3 / product, share * 2 * COPY_BYTES / copy, 1 / large, small)


def _seconds(call: Callable[[], object]) -> float:
    """Wall seconds until all ranks are done."""
    distributed.barrier()
    started = perf_counter()
    call()
    distributed.barrier()
    return perf_counter() - started


def measured_section(cases: Sequence[str], processes: Sequence[int], rounds: int) -> str:
    """A table for each case: seconds measured and predicted, and their ratio, medians over the rounds."""
    about, load = measure.environment(torch.device("cpu")), os.getloadavg()[0]
    lines = [
        f"**Measured** on gloo processes of one thread each, which share {os.cpu_count()} cores of {about['device']}: "
        f"fp32, {rounds} rounds, torch {about['torch']}, commit {about['commit']}, {about['date'][:10]}, load average "
        f"{load:.1f} before. Medians; ratios are measured / predicted of the same round, with the least and the most."
    ]
    for case in cases:
        rows = []
        for count in processes:
            job = Job(count, *map(int, case.split("x")))
            machines, *seconds = zip(*measured(job, rounds), strict=True)
            row = {"processes": str(count)}
            for part, found, model in zip(("graph", "step"), seconds, (graph_seconds, step_seconds), strict=True):
                predicted = [model(job, machine) for machine in machines]
                ratios = [one / other for one, other in zip(found, predicted, strict=True)]
                row |= {part: results.time(median(found)), f"{part}, predicted": results.time(median(predicted))}
                row[f"{part}, ratio"] = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            flops, copy, network, latency = (median(rates) for rates in zip(*machines, strict=True))
            row |= {"GFLOP/s": f"{1e-9 * flops:.3g}", "copy GB/s": f"{1e-9 * copy:.3g}"}
            row |= {"gloo GB/s": f"{1e-9 * network:.2g}", "latency": results.time(latency)}
            rows.append(row if count > 1 else row | {"gloo GB/s": "", "latency": ""})
        table = {name: [row[name] for row in rows] for name in rows[0]}
        lines += [f"`{SIZES}` = {case}; rates are those of a process:", results.grid(table)]
    return "\n\n".join(lines)


def computed_section() -> str:
    """Tables of GPUs, by the model and what is assumed of them."""
    jobs = [Job(count, classes, 512, 7, 7, 20, 64, itemsize=2) for classes in CLASSES for count in GPUS]
    machines = [Machine(GPU_FLOPS, GPU_COPY, NVLINK if job.ranks <= NODE else INFINIBAND, GPU_LATENCY) for job in jobs]
    held = [memory(job) for job in jobs]
    received = [sum(each.received(job.ranks) for part in graph_messages(job) for each in part) for job in jobs]
    by_size = {
        "classes": [f"{job.classes // 10**6}M" for job in jobs],
        "GPUs": [f"{job.ranks:,}" for job in jobs],
        **{f"{part}, GB": [f"{1e-9 * each[part]:,.1f}" for each in held] for part in held[0]},
        "on the CPU, GB": [f"{1e-9 * sampler_bytes(job, INSTANCES):,.1f}" for job in jobs],
        "fits": ["yes" if each["peak"] <= GPU_BYTES else "no" for each in held],
        "graph, s": [f"{graph_seconds(job, machine):,.1f}" for job, machine in zip(jobs, machines, strict=True)],
        "received, GB": [f"{1e-9 * nbytes:,.0f}" for nbytes in received],
        "AdamW, ms": [
            f"{1e3 * adamw_bytes(job) / machine.copy:,.1f}" for job, machine in zip(jobs, machines, strict=True)
        ],
    }
    steps = [(job, machine, step_messages(job)) for job, machine in zip(jobs, machines, strict=True)][: len(GPUS)]
    shared = f"maps, {INSTANCES} samples a class, MB"
    by_ranks = {
        "GPUs": by_size["GPUs"][: len(GPUS)],
        "received, MB": [f"{1e-6 * sum(each.received(job.ranks) for each in sent):,.0f}" for job, _, sent in steps],
        "network, ms": [f"{1e3 * machine.sending(sent, job.ranks):,.1f}" for job, machine, sent in steps],
        "probes, MB": [f"{1e-6 * (job.ranks - 1) * job.batch * job.map_bytes:,.0f}" for job, *_ in steps],
        "maps, MB": [f"{1e-6 * fetched_bytes(job):,.0f}" for job, *_ in steps],
        shared: [f"{1e-6 * fetched_bytes(job) / INSTANCES:,.0f}" for job, *_ in steps],
    }
    assumed = (
        f"**Computed, not measured**, for maps of 512x7x7 in bf16, K = {jobs[0].k} and the own class, {jobs[0].batch} "
        f"samples a GPU. Assumed of a GPU: {1e-12 * GPU_FLOPS:.0f} TFLOP/s, {1e-12 * GPU_COPY:.1f} TB/s of its memory, "
        f"{1e-9 * GPU_BYTES:.0f} GB; it receives {1e-9 * NVLINK:.0f} GB/s in a job of one node of {NODE}, "
        f"{1e-9 * INFINIBAND:.0f} GB/s in one of several; {1e6 * GPU_LATENCY:.0f} us a message."
    )
    return "\n\n".join(
        [assumed, results.grid(by_size), "A step receives the same for any number of classes:", results.grid(by_ranks)]
    )
