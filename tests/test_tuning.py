"""The table of configurations, the choice among them, in the process and on disk, and the warm-up that makes it."""

from __future__ import annotations

import functools
import json
import logging
import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from unittest.mock import Mock

import pytest
import torch
from tolerances import assert_gradients, assert_values

from qaconv_triton import functional, reference, warmup
from qaconv_triton.kernels import config

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from qaconv_triton.kernels import cosine_topk, tuning
from qaconv_triton.kernels.config import Config

ARCHITECTURES = (80, 86, 89, 90, 100, config.AMD)
CONFIGS = [Config({"BC": 2**power}, num_warps=4, num_stages=3) for power in range(4)]
SHAPES = {
    config.correlation_forward: [(locations, 512, *sizes) for locations in (49, 192) for sizes in ((2, 2), (4, 4))],
    config.correlation_backward: [(locations, 512, size) for locations in (49, 192) for size in (2, 4)],
    config.cosine_topk: [(dim, size) for dim in (512, 25_088) for size in (2, 4)],
}
QUESTION = (config.cosine_topk, (25_088, 2))


def table(locations: int) -> list[Config]:
    return CONFIGS


class Launches:
    """Stands in for a kernel's launch: notes what it is launched with, and spills or finds no memory as told."""

    def __init__(self, spills: dict[int, int] | None = None, too_large: tuple[int, ...] = ()) -> None:
        self.calls: list[int] = []
        self.spills, self.too_large = spills or {}, too_large

    def __call__(self, chosen: Config) -> SimpleNamespace:
        number = CONFIGS.index(chosen)
        self.calls.append(number)
        if number in self.too_large:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return SimpleNamespace(n_spills=self.spills.get(number, 0))


def choose(launches: Launches, operations: float = 1e15, variant: str = "tf32") -> int:
    return CONFIGS.index(tuning.select_config(table, (49,), variant, operations, launches))


@pytest.fixture
def tunable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tuning switched on, with nothing chosen yet and a cache of its own; a configuration takes its BC in time."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setenv(tuning.TUNE_VARIABLE, "1")
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuning, "selected", {})
    monkeypatch.setattr(tuning, "_milliseconds", lambda run: 10.0 - run.args[0].tiles["BC"])
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
                assert num_warps in (2, 4, 8)
                assert num_stages in (2, 3)


def test_a_shape_class_holds_models_not_batches() -> None:
    assert config.shape_class(49, 512, 2, 4) == config.shape_class(64, 512, 2, 4) == (64, 512, 2, 4)
    for architecture_row in (config.correlation_forward, config.correlation_backward):
        for shape in SHAPES[architecture_row]:
            assert architecture_row(*config.shape_class(*shape)) == architecture_row(*shape)


def test_the_fastest_is_chosen_once(tunable: Path) -> None:
    launches = Launches()
    assert choose(launches) == 3
    assert launches.calls == [0, 1, 2, 3]  # the benchmark's clock is made up here
    assert choose(launches) == 3
    assert len(launches.calls) == 4
    assert choose(launches, variant="tf32x3") == 3  # another kernel
    assert len(launches.calls) == 8


def test_small_launches_take_what_is_shipped(tunable: Path) -> None:
    launches = Launches()
    assert choose(launches, operations=tuning.MIN_TUNED_FLOPS / 2) == 0
    assert launches.calls == []
    assert list(tunable.iterdir()) == []


@pytest.mark.parametrize("why", ["pinned", "deterministic"])
def test_the_shipped_configuration_can_be_had_always(why: str, tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    assert choose(launches) == 3
    if why == "pinned":
        monkeypatch.setenv(tuning.TUNE_VARIABLE, "0")
    else:
        torch.use_deterministic_algorithms(True)
    assert choose(launches) == 0


def test_a_wrong_setting_is_named(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.TUNE_VARIABLE, "yes")
    with pytest.raises(ValueError, match="QACONV_TRITON_TUNE: expected '0' or '1', got 'yes'"):
        choose(Launches())


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU tuning is on by default")
def test_the_interpreter_tunes_only_when_told(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.TUNE_VARIABLE)
    assert not tuning.is_on()


def test_what_spills_or_finds_no_room_takes_no_part(tunable: Path) -> None:
    assert tuning.benchmark_configs(CONFIGS, Launches({3: 64})) == ({0: 9.0, 1: 8.0, 2: 6.0}, True)
    assert tuning.benchmark_configs(CONFIGS, Launches({2: 8}, too_large=(3,))) == ({0: 9.0, 1: 8.0}, True)
    every = dict.fromkeys(range(4), 8)
    assert set(tuning.benchmark_configs(CONFIGS, Launches(every))[0]) == {0, 1, 2, 3}  # all spill: the clock decides


def test_no_failing_trial_ends_the_caller(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first launch of a configuration, the shipped one included, nor a later one."""
    assert choose(Launches(too_large=(0, 3))) == 2
    assert choose(Launches(too_large=(0, 1, 2, 3)), variant="none fits") == 0  # its launch says what is wrong

    def fails(run: Any) -> float:
        if run.args[0] is CONFIGS[3]:
            raise RuntimeError("Triton Error [CUDA]: an illegal instruction was encountered")
        return 10.0 - run.args[0].tiles["BC"]

    monkeypatch.setattr(tuning, "_milliseconds", fails)
    assert choose(Launches(), variant="second launch") == 2


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


def test_without_memory_to_tune_the_shipped_one_runs(
    tunable: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(run: Callable[[], object]) -> float:
        raise torch.OutOfMemoryError("256 MB")

    monkeypatch.setattr(tuning, "_milliseconds", full)
    assert choose(Launches()) == 0
    assert "cannot time" in caplog.text
    assert list(tunable.iterdir()) == []


def test_a_choice_on_disk_that_no_longer_launches_is_replaced(tunable: Path) -> None:
    assert choose(Launches()) == 3
    (path,) = tunable.iterdir()
    tuning.selected.clear()
    assert choose(Launches(too_large=(3,))) == 2
    assert json.loads(path.read_text())["best"] == 2
    tuning.selected.clear()
    assert choose(Launches(too_large=(0, 1, 2, 3))) == 0
    assert json.loads(path.read_text())["best"] == 2


def test_choices_outlive_the_process(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tunable.chmod(0o755)
    assert choose(Launches()) == 3
    (path,) = tunable.iterdir()
    assert path.stat().st_mode & 0o777 == 0o644  # who may enter may read
    kept = json.loads(path.read_text())
    assert kept["best"] == 3
    assert kept["milliseconds"] == {"0": 9.0, "1": 8.0, "2": 6.0, "3": 2.0}
    monkeypatch.setattr(tuning, "selected", {})
    launches = Launches()
    assert choose(launches) == 3
    assert launches.calls == [3]  # does it launch here?
    launches.calls.clear()
    monkeypatch.setattr(tuning, "selected", {})
    monkeypatch.setattr(tuning, "_device_name", lambda: "another GPU")
    assert choose(launches) == 3
    assert launches.calls == [0, 1, 2, 3]
    assert len(list(tunable.iterdir())) == 2


def test_the_first_of_several_processes_decides(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(Launches()) == 3
    (path,) = tunable.iterdir()
    content = json.loads(path.read_text())
    path.unlink()
    monkeypatch.setattr(tuning, "selected", {})

    def meanwhile(run: Callable[[], object]) -> float:
        path.write_text(json.dumps(content | {"best": 1}))
        return 1.0

    monkeypatch.setattr(tuning, "_milliseconds", meanwhile)
    assert choose(Launches()) == 1
    assert json.loads(path.read_text())["best"] == 1
    assert list(tunable.iterdir()) == [path]  # nothing half-written is left


def unusable(path: Path, kind: str) -> None:
    """Put something at `path`, where there is a choice, that nobody can use."""
    content = json.loads(path.read_text())
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "dangling link":
        path.symlink_to(path.parent / "elsewhere" / "file")
    elif kind == "link":
        target = path.parent.parent / "target"
        target.write_text(json.dumps(content | {"best": 1}))
        path.symlink_to(target)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)
    elif kind == "another key":
        path.write_text(json.dumps(content | {"shape": [192], "best": 1}))
    elif kind == "no key":
        path.write_text('{"best": 1}')
    elif kind.startswith("best"):
        path.write_text(json.dumps(content | {"best": json.loads(kind.removeprefix("best "))}))
    else:
        path.write_bytes({"nested": b"[" * 60_000, "bytes": b"\xff\x00"}.get(kind, kind.encode()))


KINDS = ["", "[]", "{}", "bytes", "nested", "1" + "0" * 5000, "best -1", "best 4", "best true", "best 1.0", 'best "1"']
KINDS += ["best null", "another key", "no key", "fifo", "endless", "dangling link", "link", "sparse"]


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_lies_in_the_place_of_a_choice_is_told_and_replaced(
    kind: str, tunable: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tunable / "cache"
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(cache))
    assert choose(Launches()) == 3
    (path,) = cache.iterdir()
    whole = path.read_text()
    unusable(path, kind)
    tuning.selected.clear()
    with caplog.at_level(logging.WARNING):
        assert choose(Launches()) == 3
    assert str(path) in caplog.text
    assert path.read_text() == whole
    assert not path.is_symlink()
    assert list(cache.iterdir()) == [path]
    if kind == "link":
        assert json.loads((tunable / "target").read_text())["best"] == 1


def test_a_folder_in_the_place_of_a_choice_is_left(tunable: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert choose(Launches()) == 3
    (path,) = tunable.iterdir()
    path.unlink()
    path.mkdir()
    tuning.selected.clear()
    assert choose(Launches()) == 3
    assert "for this process only" in caplog.text
    assert list(tunable.iterdir()) == [path]


def test_nothing_that_lies_in_the_cache_is_written_through(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of the file that is being written cannot be guessed, so that no link can lie there."""
    precious = tunable / "precious"
    precious.write_text("kept")
    cache = tunable / "cache"
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(cache))
    assert choose(Launches()) == 3
    (path,) = cache.iterdir()
    path.unlink()
    for name in (path.with_suffix(f".{os.getpid()}"), cache / f"{tuning.PREFIX}{tuning.SUFFIX}"):
        name.symlink_to(precious)
    tuning.selected.clear()
    assert choose(Launches()) == 3
    assert precious.read_text() == "kept"
    assert json.loads(path.read_text())["best"] == 3


def test_processes_of_the_same_id_do_not_mix_their_files(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in two containers: one publishes while the other writes."""
    real, inner = json.dump, []

    def meanwhile(content: dict[str, Any], file: IO[str], **options: Any) -> None:
        real(content | {"best": 1}, file, **options)
        if not inner:
            inner.append(True)
            tuning._publish(path, cache_key, {0: 1.0, 1: 1.0, 2: 0.5}, 2)

    assert choose(Launches()) == 3
    (path,) = tunable.iterdir()
    cache_key = {
        name: value for name, value in json.loads(path.read_text()).items() if name not in ("milliseconds", "best")
    }
    path.unlink()
    monkeypatch.setattr(json, "dump", meanwhile)
    tuning._publish(path, cache_key, {0: 1.0, 1: 0.5}, 1)
    assert inner
    assert json.loads(path.read_text())["best"] == 1
    assert list(tunable.iterdir()) == [path]


def test_what_killed_writers_left_is_removed(tunable: Path) -> None:
    old, new, foreign = (tunable / name for name in (".choice-a.tmp", ".choice-b.tmp", "notes.tmp"))
    for path in (old, new, foreign):
        path.touch()
    for path in (old, foreign):
        os.utime(path, (0, 0))
    assert choose(Launches()) == 3
    assert not old.exists()
    assert new.exists()  # may be being written
    assert foreign.exists()


def test_without_hard_links_choices_are_kept(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "link")
    assert choose(Launches()) == 3
    (path,) = tunable.iterdir()
    assert json.loads(path.read_text())["best"] == 3


@pytest.mark.parametrize("why", ["a file", "below a file", "dangling link", "read-only", "no home"])
def test_without_a_directory_to_write_a_choice_is_for_the_process(
    why: str, tunable: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tunable / "blocked"
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(blocked / "inner" if why == "below a file" else blocked))
    if why == "dangling link":
        blocked.symlink_to(tunable / "nothing")
    elif why in ("a file", "below a file"):
        blocked.touch()
    elif why == "read-only":  # not by its mode, which root may ignore
        monkeypatch.setattr(tempfile, "mkstemp", Mock(side_effect=PermissionError("read-only")))
    else:
        monkeypatch.setenv(tuning.CACHE_VARIABLE, "~nobody-of-this-name/cache")
        monkeypatch.chdir(tunable)
    before = set(tunable.iterdir())
    launches = Launches()
    assert choose(launches) == choose(launches) == 3
    assert len(launches.calls) == 4
    assert "for this process only" in caplog.text
    assert set(tunable.iterdir()) - {blocked} == before - {blocked}


def test_where_choices_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tuning.cache_directory() == Path("/somewhere/qaconv_triton")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification tells to ignore
    assert tuning.cache_directory() == Path.home() / ".cache/qaconv_triton"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.cache_directory() == Path.home() / ".cache/qaconv_triton"
    monkeypatch.setenv(tuning.CACHE_VARIABLE, "/elsewhere")
    assert tuning.cache_directory() == Path("/elsewhere")
    monkeypatch.setenv(tuning.CACHE_VARIABLE, "~/mine")
    assert tuning.cache_directory() == Path.home() / "mine"


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", Mock(side_effect=KeyError("no such user")))
    assert tuning.cache_directory() is None
    monkeypatch.setenv("HOME", "relative")
    assert tuning.cache_directory() is None


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
            (config.generation(), config.shared_memory(), rows, tuning._configs(*QUESTION, config.generation()))
        )
    assert [generation for generation, *_ in found] == [90, 86, 90]
    assert [shared for _, shared, *_ in found] == [232_448, 101_376, 232_448]
    assert found[0] == found[2]
    assert found[0][2] != found[1][2]
    assert found[0][3] != found[1][3]


def test_each_gpu_has_its_own_choice(
    two_gpus: Callable[[int], None], tunable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process by index, on disk by name: another process may count the GPUs otherwise."""
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    assert choose(Launches()) == 3
    two_gpus(1)
    launches = Launches(too_large=(3,))
    assert choose(launches) == 2
    assert launches.calls == [0, 1, 2, 3]
    two_gpus(0)
    assert choose(launches) == 3
    assert {json.loads(path.read_text())["device"] for path in tunable.iterdir()} == {"first", "second"}


@pytest.mark.parametrize("indexed", [False, True])
def test_tuned_matching_is_right(
    indexed: bool, tunable: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every configuration runs on the real buffers, one after the other: what is left in them is right."""
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "triton")
    monkeypatch.setattr(tuning, "MIN_TUNED_FLOPS", 0.0)
    tried = []
    monkeypatch.setattr(tuning, "_milliseconds", lambda run: (run(), tried.append(run.args[0]), -float(len(tried)))[-1])
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
    assert {name for name, *_ in tuning.selected} == {"correlation_forward", "correlation_backward"}
    assert len(tuning.selected) == 3  # one for each gradient
    shipped = [config.correlation_forward(20, 40, 4, 4)[0], config.correlation_backward(20, 40, 4)[0]]
    assert not set(map(str, tuning.selected.values())) & set(map(str, shipped))  # the last to be tried has won


@pytest.mark.parametrize("same", [False, True])
def test_a_tuned_search_is_right(
    same: bool, tunable: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "triton")
    embeddings, keys = torch.randn(2, 300 if same else 140, 24, device=device)  # of 300 it takes a sample first
    keys = keys if not same else embeddings
    if same:  # two searches: few configurations
        every = config.cosine_topk
        monkeypatch.setattr(config, "cosine_topk", functools.wraps(every)(lambda *shape: every(*shape)[:2]))
    monkeypatch.setattr(tuning, "MIN_TUNED_FLOPS", 0.0)
    monkeypatch.setattr(cosine_topk, "MIN_TRIAL_ROWS", 0)
    tried = []
    monkeypatch.setattr(tuning, "_milliseconds", lambda run: (run(), tried.append(run.args[0]), -float(len(tried)))[-1])
    if same:
        found = functional.class_neighbors(embeddings, 7, return_similarities=True)
    else:
        found = functional.topk_cosine(embeddings, keys, 7)
    unit = [reference.normalize(vectors.double().cpu()) for vectors in (embeddings, keys)]
    expected = reference.cosine_topk(*unit, 7, same)[0]
    assert_values(found[0].cpu(), expected, torch.float32)
    assert_values((unit[0] @ unit[1].mT).gather(1, found[1].cpu()), expected, torch.float32)
    assert len(tried) == (2 * 2 if same else len(config.cosine_topk(16, 4)))
    variants = {variant.split()[-1] for _, _, variant, _ in tuning.selected}
    assert variants == ({"self", "cross"} if same else {"cross"})  # a graph's first thresholds come from a sample


def test_keys_part_kernels_and_hold_no_batch_size(
    tunable: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "triton")
    seen: set[tuple[object, ...]] = set()

    def choose(row: tuning.ListConfigs, shape: tuple[int, ...], variant: str, operations: float, run: object) -> Config:
        seen.add((row.__name__, shape, variant))
        return row(*shape)[0]

    monkeypatch.setattr(tuning, "select_config", choose)

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
    assert keys(full, full, 3, 4, 2) == keys(full, full, 1, 9, 5)
    kinds = [keys(*dtypes, 3, 4, k) for dtypes in ((full, full), (half, half)) for k in (2, None)]
    assert len(set.union(*kinds)) == sum(map(len, kinds))


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
    assert "\r" not in run.stderr  # no bar in a log


@pytest.mark.parametrize(
    ("wanted", "home", "said"),
    [
        ("0", True, "(QACONV_TRITON_TUNE='0'): kernels run with the defaults"),
        ("1", True, "Choices are kept in /somewhere."),
        ("1", False, "for this process only: no home directory"),
    ],
)
def test_the_warm_up_says_what_is_kept(
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
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        dict(warmup._steps(options, options.device))["all pairs of 4, float32"]()
    finally:
        torch.set_default_dtype(before)
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
def test_the_warm_up_refuses_what_is_no_model(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        warmup.main([*MODEL, option, value])
    assert said in capsys.readouterr().err
