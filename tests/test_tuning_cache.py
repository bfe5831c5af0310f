"""Selected configurations are cached on disk, and whatever else lies there does no harm."""

from __future__ import annotations

import json
import logging
import os
import pwd
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from unittest.mock import Mock

import pytest

pytest.importorskip("triton")
from fake_launches import Launches, select, tune

from qaconv_triton.kernels import tuning


@pytest.fixture
def tunable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tune(tmp_path, monkeypatch)
    return tmp_path


def test_a_cached_configuration_that_no_longer_launches_is_replaced(tunable: Path) -> None:
    assert select(Launches()) == 3
    (path,) = tunable.iterdir()
    tuning.selected.clear()
    assert select(Launches(too_large=(3,))) == 2
    assert json.loads(path.read_text())["best"] == 2
    tuning.selected.clear()
    assert select(Launches(too_large=(0, 1, 2, 3))) == 0
    assert json.loads(path.read_text())["best"] == 2


def test_selections_outlive_the_process(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tunable.chmod(0o755)
    assert select(Launches()) == 3
    (path,) = tunable.iterdir()
    assert path.stat().st_mode & 0o777 == 0o644  # who may enter may read
    kept = json.loads(path.read_text())
    assert kept["best"] == 3
    assert kept["milliseconds"] == {"0": 9.0, "1": 8.0, "2": 6.0, "3": 2.0}
    monkeypatch.setattr(tuning, "selected", {})
    launches = Launches()
    assert select(launches) == 3
    assert launches.calls == [3]  # does it launch here?
    launches.calls.clear()
    monkeypatch.setattr(tuning, "selected", {})
    monkeypatch.setattr(tuning, "_device_name", lambda: "another GPU")
    assert select(launches) == 3
    assert launches.calls == [0, 1, 2, 3]
    assert len(list(tunable.iterdir())) == 2


def test_the_first_of_several_processes_decides(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert select(Launches()) == 3
    (path,) = tunable.iterdir()
    content = json.loads(path.read_text())
    path.unlink()
    monkeypatch.setattr(tuning, "selected", {})

    def meanwhile(run: Callable[[], object]) -> float:
        path.write_text(json.dumps(content | {"best": 1}))
        return 1.0

    monkeypatch.setattr(tuning, "_milliseconds", meanwhile)
    assert select(Launches()) == 1
    assert json.loads(path.read_text())["best"] == 1
    assert list(tunable.iterdir()) == [path]  # nothing half-written is left


def unusable(path: Path, kind: str) -> None:
    """Put something at `path`, where a selection is cached, that cannot be used."""
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
def test_a_file_that_cannot_be_used_is_reported_and_replaced(
    kind: str, tunable: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tunable / "cache"
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(cache))
    assert select(Launches()) == 3
    (path,) = cache.iterdir()
    whole = path.read_text()
    unusable(path, kind)
    tuning.selected.clear()
    with caplog.at_level(logging.WARNING):
        assert select(Launches()) == 3
    assert str(path) in caplog.text
    assert path.read_text() == whole
    assert not path.is_symlink()
    assert list(cache.iterdir()) == [path]
    if kind == "link":
        assert json.loads((tunable / "target").read_text())["best"] == 1


def test_a_folder_in_the_place_of_a_file_is_left(tunable: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert select(Launches()) == 3
    (path,) = tunable.iterdir()
    path.unlink()
    path.mkdir()
    tuning.selected.clear()
    assert select(Launches()) == 3
    assert "for this process only" in caplog.text
    assert list(tunable.iterdir()) == [path]


def test_nothing_that_lies_in_the_cache_is_written_through(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of the file that is being written is random, so that no link can lie there."""
    precious = tunable / "precious"
    precious.write_text("kept")
    cache = tunable / "cache"
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(cache))
    assert select(Launches()) == 3
    (path,) = cache.iterdir()
    path.unlink()
    for name in (path.with_suffix(f".{os.getpid()}"), cache / f"{tuning.PREFIX}{tuning.SUFFIX}"):
        name.symlink_to(precious)
    tuning.selected.clear()
    assert select(Launches()) == 3
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

    assert select(Launches()) == 3
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


def test_files_of_killed_writers_are_removed(tunable: Path) -> None:
    old, new, foreign = (tunable / name for name in (".choice-a.tmp", ".choice-b.tmp", "notes.tmp"))
    for path in (old, new, foreign):
        path.touch()
    for path in (old, foreign):
        os.utime(path, (0, 0))
    assert select(Launches()) == 3
    assert not old.exists()
    assert new.exists()  # may be being written
    assert foreign.exists()


def test_without_hard_links_selections_are_cached(tunable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "link")
    assert select(Launches()) == 3
    (path,) = tunable.iterdir()
    assert json.loads(path.read_text())["best"] == 3


@pytest.mark.parametrize("why", ["a file", "below a file", "dangling link", "read-only", "no home"])
def test_without_a_directory_to_write_a_selection_is_for_the_process(
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
    assert select(launches) == select(launches) == 3
    assert len(launches.calls) == 4
    assert "for this process only" in caplog.text
    assert set(tunable.iterdir()) - {blocked} == before - {blocked}


def test_where_selections_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tuning.cache_directory() == Path("/somewhere/qaconv_triton")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
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
