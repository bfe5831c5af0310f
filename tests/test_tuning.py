"""Which configuration a launch takes: the default or the fastest, on every GPU its own, with the same results."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tolerances import assert_gradients, assert_values

from qaconv_triton import functional, reference
from qaconv_triton.kernels import config

pytest.importorskip("triton")
from fake_launches import CONFIGS, Launches, select, table, tune

from qaconv_triton.kernels import cosine_topk, tuning
from qaconv_triton.kernels.config import Config

ARCHITECTURES = (80, 86, 89, 90, 100, config.AMD)
SHAPES = {
    config.correlation_forward: [
        (locations, 512, *sizes, together)
        for locations in (49, 192)
        for sizes in ((2, 2), (2, 4), (4, 4))
        for together in (1, 2, 4)
    ],
    config.correlation_backward: [
        (locations, 512, *sizes, tma) for locations in (49, 192) for sizes in ((2, 2), (2, 4), (4, 4)) for tma in (0, 1)
    ],
    config.cosine_topk: [(dim, size) for dim in (512, 25_088) for size in (2, 4)],
}


@pytest.fixture
def tunable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tune(tmp_path, monkeypatch)
    return tmp_path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_table_has_several_different_configurations_that_fit(
    architecture: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "generation", lambda: architecture)
    for row, shapes in SHAPES.items():
        for shape in shapes:
            found = row(*shape)
            assert len(found) >= 2, (row, shape)
            assert all(each not in found[:number] for number, each in enumerate(found))
            for tiles, num_warps, num_stages in found:
                assert all(size & (size - 1) == 0 for size in tiles.values())
                assert num_warps in (2, 4, 8, 16)
                assert num_stages in (2, 3, 4)


def test_a_shape_class_holds_models_not_batches() -> None:
    assert config.shape_class(49, 512, 2, 4) == config.shape_class(64, 512, 2, 4) == (64, 512, 2, 4)
    for architecture_row in (config.correlation_forward, config.correlation_backward):
        for shape in SHAPES[architecture_row]:
            assert architecture_row(*config.shape_class(*shape)) == architecture_row(*shape)


def test_the_fastest_is_selected_once(tunable: Path) -> None:
    launches = Launches()
    assert select(launches) == 3
    assert launches.calls == [0, 1, 2, 3]  # the benchmark's clock is made up here
    assert select(launches) == 3
    assert len(launches.calls) == 4
    assert select(launches, variant="tf32x3") == 3  # another kernel
    assert len(launches.calls) == 8


def test_small_launches_take_the_default(tunable: Path) -> None:
    launches = Launches()
    assert select(launches, operations=tuning.MIN_TUNED_FLOPS / 2) == 0
    assert launches.calls == []
    assert list(tunable.iterdir()) == []


@pytest.mark.parametrize("why", ["pinned", "deterministic"])
def test_the_default_is_always_available(why: str, tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    assert select(launches) == 3
    if why == "pinned":
        monkeypatch.setenv(tuning.TUNE_VARIABLE, "0")
    else:
        torch.use_deterministic_algorithms(True)
    assert select(launches) == 0


def test_an_unknown_setting_is_refused(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.TUNE_VARIABLE, "yes")
    with pytest.raises(ValueError, match="QACONV_TRITON_TUNE: expected '0' or '1', got 'yes'"):
        select(Launches())


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU tuning is on by default")
def test_the_interpreter_tunes_only_on_request(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.TUNE_VARIABLE)
    assert not tuning.is_on()


def test_configurations_that_spill_or_do_not_fit_are_excluded(tunable: Path) -> None:
    assert tuning.benchmark_configs(CONFIGS, Launches({3: 64})) == ({0: 9.0, 1: 8.0, 2: 6.0}, True)
    assert tuning.benchmark_configs(CONFIGS, Launches({2: 8}, too_large=(3,))) == ({0: 9.0, 1: 8.0}, True)
    every = dict.fromkeys(range(4), 8)
    assert set(tuning.benchmark_configs(CONFIGS, Launches(every))[0]) == {0, 1, 2, 3}  # all spill: the clock decides


def test_a_failing_trial_is_excluded(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first launch of a configuration, the default included, nor a later one."""
    assert select(Launches(too_large=(0, 3))) == 2
    assert select(Launches(too_large=(0, 1, 2, 3)), variant="none fits") == 0  # its launch says what is wrong

    def fails(run: Any) -> float:
        if run.args[0] is CONFIGS[3]:
            raise RuntimeError("Triton Error [CUDA]: an illegal instruction was encountered")
        return 10.0 - run.args[0].tiles["BC"]

    monkeypatch.setattr(tuning, "_milliseconds", fails)
    assert select(Launches(), variant="second launch") == 2


@pytest.mark.parametrize("where", ["first launch", "clock"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("256 MB"), RuntimeError("Triton Error [CUDA]: out of memory")]
)
def test_a_benchmark_that_lacked_memory_is_not_kept(
    error: Exception, where: str, tunable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest finds no memory today; another process may have more."""

    def short(run: Any) -> float:
        if where == "clock" and run.args[0] is CONFIGS[3]:
            raise error
        return 10.0 - run.args[0].tiles["BC"]

    def launch(config: Config) -> SimpleNamespace:
        if where == "first launch" and config is CONFIGS[3]:
            raise error
        return SimpleNamespace(n_spills=0)

    monkeypatch.setattr(tuning, "_milliseconds", short)
    assert tuning.select_config(table, (49,), "", 1e15, launch) == CONFIGS[2]
    assert list(tunable.iterdir()) == []


def test_without_memory_to_tune_the_default_runs(
    tunable: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(run: Callable[[], object]) -> float:
        raise torch.OutOfMemoryError("256 MB")

    monkeypatch.setattr(tuning, "_milliseconds", full)
    assert select(Launches()) == 0
    assert "cannot time" in caplog.text
    assert list(tunable.iterdir()) == []


@pytest.mark.parametrize("seconds", [0.4, 30.0])
def test_the_first_launch_says_how_long_it_compiled(
    seconds: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter((0.0, seconds))
    monkeypatch.setattr(tuning, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "launched", set())
    for kernel in range(3):
        assert tuning.launch_announced("forward", lambda kernel=kernel: kernel) == kernel
    expected = ["compiled the forward kernel in 30.0 s; python -m qaconv_triton.warmup does it before training"]
    assert caplog.messages == (expected if seconds > 1 else [])


# --- several GPUs


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Two GPUs, of sm_90 and of sm_86; a function that makes one of them current."""
    current = [0]
    config._compute_capability.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(
        torch.cuda,
        "get_device_capability",
        lambda device=None: [(9, 0), (8, 6)][current[0] if device is None else device],
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: ["first", "second"][current[0]])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield lambda device: current.__setitem__(0, device)
    config._compute_capability.cache_clear()


def test_each_gpu_has_its_own_tiles_and_shared_memory(two_gpus: Callable[[int], None]) -> None:
    found = []
    for device in (0, 1, 0):
        two_gpus(device)
        rows = [row(*shape) for row, shapes in SHAPES.items() for shape in shapes]
        found.append(
            (
                config.generation(),
                config.shared_memory(),
                rows,
                tuning._configs(config.cosine_topk, (25_088, 2), config.generation()),
            )
        )
    assert [generation for generation, *_ in found] == [90, 86, 90]
    assert [shared for _, shared, *_ in found] == [232_448, 101_376, 232_448]
    assert found[0] == found[2]
    assert found[0][2] != found[1][2]
    assert found[0][3] != found[1][3]


def test_each_gpu_has_its_own_selection(
    two_gpus: Callable[[int], None], tunable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process by index, on disk by name: another process may count the GPUs otherwise."""
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    assert select(Launches()) == 3
    two_gpus(1)
    launches = Launches(too_large=(3,))
    assert select(launches) == 2
    assert launches.calls == [0, 1, 2, 3]
    two_gpus(0)
    assert select(launches) == 3
    assert {json.loads(path.read_text())["device"] for path in tunable.iterdir()} == {"first", "second"}


# --- kernels


Benchmarks = list[tuple[list[Config], dict[int, float]]]  # configurations, and times of those that took part, by number


@pytest.fixture
def benchmarks(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> Benchmarks:
    """Every benchmark of the kernels, which launches of any size begin here; the last to be timed is the fastest."""
    found: Benchmarks = []
    benchmark, clock = tuning.benchmark_configs, itertools.count(0.0, -1.0)

    def recorded(configs: list[Config], run: Callable[[Config], Any]) -> tuple[dict[int, float], bool]:
        times, is_complete = benchmark(configs, run)
        found.append((configs, times))
        return times, is_complete

    monkeypatch.setenv("QACONV_TRITON_BACKEND", "triton")
    monkeypatch.setattr(tuning, "MIN_TUNED_FLOPS", 0.0)
    monkeypatch.setattr(tuning, "benchmark_configs", recorded)
    monkeypatch.setattr(tuning, "_milliseconds", lambda run: (run(), next(clock))[-1])
    return found


def assert_the_last_is_selected(benchmarks: Benchmarks) -> None:
    """Of several configurations, all of which take part in the interpreter; a compiled one that spills does not."""
    for configs, times in benchmarks:
        assert len(configs) > 1
        assert list(times) == list(range(len(configs))) if config.INTERPRETED else times
    assert list(tuning.selected.values()) == [configs[max(times)] for configs, times in benchmarks]


@pytest.mark.parametrize("indexed", [False, True])
def test_tuned_matching_is_right(indexed: bool, benchmarks: Benchmarks, device: torch.device) -> None:
    """Every configuration runs on the real buffers, one after the other: what is left in them is right."""
    size = (5, 4)
    probe, gallery = (torch.randn(count, 40, *size, device=device, requires_grad=True) for count in (2, 4))
    index = torch.tensor([[0, 2], [3, 2]], device=device) if indexed else None
    pooled = functional.max_correlation(probe, gallery, index)
    wide = [maps.detach().double().requires_grad_() for maps in (probe, gallery)]
    true = reference.max_correlation(*(reference.normalize(reference.locations(maps)) for maps in wide), index)
    assert_values(pooled, true, torch.float32)
    upstream = torch.randn_like(pooled)
    found = torch.autograd.grad(pooled, (probe, gallery), upstream)
    for got, expected in zip(found, torch.autograd.grad(true, wide, upstream.double()), strict=True):
        assert_gradients(got, expected, torch.float32)
    backward = "correlation_backward"
    assert [name for name, *_ in tuning.selected] == ["correlation_forward", backward, backward]  # for each gradient
    assert_the_last_is_selected(benchmarks)


@pytest.mark.parametrize("same", [False, True])
def test_a_tuned_search_is_right(
    same: bool, benchmarks: Benchmarks, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys = torch.randn(2, 260 if same else 70, 24, device=device)
    keys = queries if same else keys
    if same:  # a larger search: few configurations
        every = config.cosine_topk
        monkeypatch.setattr(config, "cosine_topk", functools.wraps(every)(lambda *shape: every(*shape)[:2]))
    monkeypatch.setattr(cosine_topk, "MIN_TRIAL_ROWS", 0)
    if same:
        found = functional.class_neighbors(queries, 7, return_similarities=True)
    else:
        found = functional.topk_cosine(queries, keys, 7)
    unit = [reference.normalize(vectors.double().cpu()) for vectors in (queries, keys)]
    expected = reference.cosine_topk(*unit, 7, same)[0]
    assert_values(found[0].cpu(), expected, torch.float32)
    assert_values((unit[0] @ unit[1].mT).gather(1, found[1].cpu()), expected, torch.float32)
    (variant,) = (variant.split()[-1] for _, _, variant, _ in tuning.selected)
    assert variant == ("self" if same else "cross")
    assert_the_last_is_selected(benchmarks)


def test_cache_keys_hold_dtypes_but_no_batch_size(
    tunable: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "triton")
    seen: set[tuple[object, ...]] = set()

    def first(row: tuning.ListConfigs, shape: tuple[int, ...], variant: str, operations: float, run: object) -> Config:
        seen.add((row.__name__, shape, variant))
        return row(*shape)[0]

    monkeypatch.setattr(tuning, "select_config", first)

    def keys(
        probe: torch.dtype, gallery: torch.dtype, batch: int, count: int, k: int | None
    ) -> set[tuple[object, ...]]:
        seen.clear()
        maps = [torch.randn(n, 8, 3, 2, device=device).to(d) for n, d in ((batch, probe), (count, gallery))]
        index = None if k is None else torch.randint(count, (batch, k), device=device)
        pooled = functional.max_correlation(*(each.requires_grad_() for each in maps), index)
        pooled.sum().backward()
        return set(seen)

    full, half = torch.float32, torch.bfloat16
    assert len(keys(full, full, 3, 4, 2)) == 3
    assert keys(full, full, 3, 6, 4) == keys(full, full, 1, 9, 5)
    kinds = [keys(*dtypes, 3, 4, k) for dtypes in ((full, full), (half, half)) for k in (2, None)]
    assert len(set.union(*kinds)) == sum(map(len, kinds))
