"""No result depends on the order in which programs run, on how they interleave, or on other programs' memory.

The interpreter runs them one after the other; here they run in other orders, and several at a time (schedules.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from inputs import DEVICE
from tolerances import assert_values
from torch.nn import functional as F

from qaconv_triton import QAConv, functional, ops, reference
from qaconv_triton.kernels import config, cosine_topk, topk_kernels, topk_search

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import schedules

    SCHEDULES: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "reversed": lambda: schedules.ordered(schedules.backwards),
        "shuffled": lambda: schedules.ordered(schedules.shuffled(0)),
        "interleaved": lambda: schedules.interleaved(0),
    }
    MORE_SCHEDULES: dict[str, Callable[[], AbstractContextManager[object]]] = {
        **{f"shuffled by {seed}": lambda seed=seed: schedules.ordered(schedules.shuffled(seed)) for seed in (1, 2, 3)},
        **{f"interleaved by {seed}": lambda seed=seed: schedules.interleaved(seed) for seed in range(1, 9)},
    }
interpreted = pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here: the GPU decides the order")


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels rather than the CPU path, and many small programs rather than few large ones."""
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "triton")
    monkeypatch.setattr(config, "neighbors_per_program", lambda *_: 2)
    if INTERPRETED:
        tiles = {"BM": 16, "BN": 16, "BD": 16, "GROUP": 2}
        monkeypatch.setattr(config, "cosine_topk", lambda *_: [config.Config(tiles, num_warps=4, num_stages=1)])
        monkeypatch.setattr(topk_search, "TARGET_FILL", 4.0)  # of the capacity: rounds are planned that overflow
        for name in ("MAX_KERNEL_LIST", "TORCH_TOPK_ENTRIES"):
            monkeypatch.setattr(cosine_topk, name, 64)  # so that buffers hold few of the keys
        monkeypatch.setattr(config, "select", lambda length: config.Config({"BM": 32, "BL": length}, 4, 1))
        monkeypatch.setattr(config, "sort", lambda k: config.Config({"BM": 16, "BK": 4}, 4, 1))
        monkeypatch.setattr(config, "LARGEST_TILE", 16)
        monkeypatch.setattr(config, "preparation", lambda _: config.Config({"BR": 8, "BC": 16}, 4, 1))


def class_path(height: int, width: int) -> list[Tensor]:
    """The forward over ids, scores alone, and both gradients."""
    probe = F.normalize(torch.randn(2, 4, height, width, device=DEVICE), dim=1).requires_grad_()
    gallery = torch.randn(4, 4, height, width, device=DEVICE, requires_grad=True)
    index = torch.tensor([[3, -1, 2], [0, 2, 2]], device=DEVICE)
    group = torch.tensor([1, 0], device=DEVICE)
    pooled, argmax, rnorm, _ = ops.max_correlation(probe, gallery, index, group, True, False)
    upstream = torch.randn(pooled.shape, device=DEVICE)
    gradients = torch.autograd.grad(pooled, (probe, gallery), upstream)
    weight = torch.randn(2 * height * width, device=DEVICE)
    sums = ops.pair_sums(probe, gallery, index, group, True, weight)
    maps = reference.locations(probe), reference.locations(gallery)
    expected = reference.max_correlation(*maps, index.clamp(min=0), True)
    expected = torch.where((index >= 0).unsqueeze(2), expected, torch.nan)
    assert_values(pooled, expected.detach(), torch.float32)
    return [pooled, argmax, rnorm, sums, *gradients]


def preparation() -> list[Tensor]:
    """Maps as they are matched, with a ragged last tile, and both gradients."""
    maps = torch.randn(2, 20, 3, 7, device=DEVICE, requires_grad=True)
    visibility = torch.rand(2, 1, 3, 7, device=DEVICE, requires_grad=True)
    prepared = functional.prepare_maps(maps, visibility, torch.float32)
    assert_values(prepared, (F.normalize(maps, dim=1) * visibility).detach(), torch.float32)
    return [prepared, *torch.autograd.grad(prepared, (maps, visibility), torch.randn(prepared.shape, device=DEVICE))]


def all_pairs() -> list[Tensor]:
    """Prepared maps, every probe with every one."""
    maps = [F.normalize(torch.randn(count, 4, 2, 2, device=DEVICE), dim=1).requires_grad_() for count in (3, 5)]
    pooled, argmax, *_ = ops.max_correlation(*maps, None, None, False, False)
    return [pooled, argmax, *torch.autograd.grad(pooled, maps, torch.randn(pooled.shape, device=DEVICE))]


def class_graph() -> list[Tensor]:
    """Many equals among the embeddings, so that ties are many; in chunks of 16 rows."""
    table = torch.randint(-2, 3, (48, 3), device=DEVICE).float()
    table[:, 0] += 5  # no zero vector
    values, indices = functional.class_neighbors(table, 3, return_similarities=True, workspace_bytes=2**14)
    expected, _ = reference.cosine_topk(table.double(), table.double(), 3, True)
    assert_values(values, expected, torch.float32)
    return [values, indices]


def gallery_search() -> list[Tensor]:
    """The nearest keys come last, all at once: buffers overflow, and a round is rolled back."""
    queries = torch.tensor([1.0, 0.0, 0.0], device=DEVICE) + 0.01 * torch.randn(16, 3, device=DEVICE)
    keys = torch.randn(192, 3, device=DEVICE)
    keys = keys[(keys[:, 0] / keys.norm(dim=1)).argsort()]
    values, indices = functional.topk_cosine(queries, keys, 4)
    expected, _ = reference.cosine_topk(queries.double(), keys.double(), 4, False)
    assert_values(values, expected, torch.float32)
    return [values, indices]


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "class path": lambda: class_path(2, 2),
    "class path of two blocks": lambda: class_path(17, 1),
    "preparation": preparation,
    "all pairs": all_pairs,
    "class graph": class_graph,
    "gallery search": gallery_search,
}


def results(case: str, schedule: AbstractContextManager[object]) -> list[Tensor]:
    torch.manual_seed(0)
    with schedule:
        return CASES[case]()


@interpreted
@pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("case", CASES)
def test_any_order_of_programs_gives_the_same_bits(case: str, more: bool) -> None:
    expected = results(case, nullcontext())
    for name, schedule in (MORE_SCHEDULES if more else SCHEDULES).items():
        for number, (got, wanted) in enumerate(zip(results(case, schedule()), expected, strict=True)):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True, msg=f"{name}: result {number}")


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_no_program_stores_what_another_one_accesses(case: str) -> None:
    """Except counts, which are added to atomically."""
    with schedules.conflicts() as found:
        results(case, nullcontext())
    assert found == []


@interpreted
def test_a_round_whose_buffers_overflow_is_rolled_back_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """So one of the cases above is such a round, in interleaved runs as well."""
    rolled_back = []
    rollback = topk_kernels.CandidateBuffer.rollback
    monkeypatch.setattr(
        topk_kernels.CandidateBuffer, "rollback", lambda *args: rolled_back.append(args[1]) or rollback(*args)
    )
    results("gallery search", schedules.interleaved(3))
    assert rolled_back


# --- schedules.py finds races where there are some


@triton.jit
def _last_one_wins(p_out, count):
    tl.store(p_out, tl.program_id(0))


@triton.jit
def _lost_updates(p_out, count):
    tl.store(p_out, tl.load(p_out) + 1)


@triton.jit
def _counted_twice(p_out, p_places, count):
    """Takes a place by an atomic, but reads the counter again instead of what the atomic returned."""
    tl.atomic_add(p_out, 1)
    tl.store(p_places + tl.program_id(0), tl.load(p_out))


@triton.jit
def _sound(p_out, p_places, count):
    o_lane = tl.arange(0, 4)
    b_place = tl.atomic_add(p_out + o_lane * 0, 1, mask=o_lane < 3)
    tl.store(p_places + b_place, tl.program_id(0) * 4 + o_lane, mask=o_lane < 3)


def racy(kernel: Callable[..., None], schedule: AbstractContextManager[object], count: int = 6) -> list[int]:
    out, places = torch.zeros(1, dtype=torch.int32), torch.full((4 * count,), -1, dtype=torch.int32)
    with schedule:
        kernel[(count,)](*((out, count) if "p_places" not in kernel.arg_names else (out, places, count)))  # type: ignore[attr-defined]
    return [*out.tolist(), *places.tolist()]


@interpreted
def test_a_kernel_that_depends_on_the_order_is_caught() -> None:
    assert racy(_last_one_wins, nullcontext())[0] == 5
    assert racy(_last_one_wins, schedules.ordered(schedules.backwards))[0] == 0
    assert len({racy(_last_one_wins, schedules.ordered(schedules.shuffled(seed)))[0] for seed in range(8)}) > 2


@interpreted
def test_programs_that_access_the_same_memory_are_caught() -> None:
    assert racy(_lost_updates, nullcontext())[0] == racy(_lost_updates, schedules.ordered(schedules.backwards))[0] == 6
    assert racy(_lost_updates, schedules.interleaved(0))[0] < 6
    assert racy(_counted_twice, nullcontext())[1:7] == [1, 2, 3, 4, 5, 6]
    assert sorted(racy(_counted_twice, schedules.interleaved(0))[1:7]) != [1, 2, 3, 4, 5, 6]
    for kernel, seen in ((_last_one_wins, True), (_lost_updates, True), (_counted_twice, False), (_sound, False)):
        with schedules.conflicts() as found:
            racy(kernel, nullcontext())
        assert bool(found) == seen, kernel


@interpreted
def test_programs_that_take_places_by_atomics_lose_nothing() -> None:
    runs = [racy(_sound, schedules.interleaved(seed)) for seed in range(4)]
    wanted = sorted(4 * program + lane for program in range(6) for lane in range(3))
    assert all(sorted(run[1:19]) == wanted for run in runs)
    assert len({tuple(run) for run in runs}) > 1
    assert runs[0] == racy(_sound, schedules.interleaved(0)), "a seed is a schedule"


@interpreted
def test_an_error_in_a_program_ends_the_launch() -> None:
    with pytest.raises(Exception, match="NoneType"), schedules.interleaved(0):
        _last_one_wins[(3,)](None, 1)
    assert racy(_sound, schedules.interleaved(0))[0] == 18


# --- what a GPU alone shows


@pytest.mark.parametrize(
    ("ids", "absent"),
    [([-1, 1, 2, 5, 0], [0]), ([1, -1, 2, 5, 0], [1]), ([1, 2, -1, 5, -1], [2, 4]), ([-1, -1, 3, -1, 0], [0, 1, 3])],
)
@pytest.mark.parametrize("size", [(2, 3), (17, 1)])
def test_an_absent_neighbor_alone_is_nan(
    size: tuple[int, int], ids: list[int], absent: list[int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several neighbours that one program streams: as compiled code, each was taken for what the first was."""
    monkeypatch.setattr(config, "neighbors_per_program", lambda *_: 3)
    probe = F.normalize(torch.randn(2, 5, *size, device=DEVICE), dim=1)
    gallery = torch.randn(6, 5, *size, device=DEVICE)
    index = torch.tensor([ids, ids], device=DEVICE)
    pooled = ops.max_correlation(probe, gallery, index, None, True, False)[0]
    assert pooled.isnan().all(2)[0].nonzero().flatten().tolist() == absent
    assert pooled.isnan().any(2)[1].nonzero().flatten().tolist() == absent
    expected = reference.max_correlation(
        reference.locations(probe.double()), reference.locations(gallery.double()), index.clamp(min=0), True
    )
    there = index >= 0
    assert_values(pooled[there], expected[there], torch.float32)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_a_training_step_reads_nothing_back(backend: str) -> None:
    """Except the class graph, which reads the length of its longest buffer once a round."""
    matcher = QAConv(8, 3, 2, num_classes=40, k_nearest=5, include_self=True).cuda()
    features = torch.randn(6, 8, 3, 2, device="cuda", requires_grad=True)
    labels = torch.arange(6, device="cuda")
    optimizer = torch.optim.SGD(matcher.parameters(), lr=0.1)

    def step() -> Tensor:
        scores = matcher.class_scores(features, labels)
        loss = F.cross_entropy(scores.values, torch.zeros_like(labels)) + matcher(features, features).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step()  # compiles kernels, and builds the graph
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
