"""Progress: a progress bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import io
import sys

import pytest

from qaconv_triton import progress

CALLS = 1000


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    """A computation of a hundred seconds that reports its progress a thousand times."""
    monkeypatch.setattr(sys, "stderr", stream)
    seconds = iter(range(0, 100 * CALLS, 100))
    monkeypatch.setattr(progress, "perf_counter", lambda: next(seconds) / 1000)
    with progress.show_progress("name", "items") as update:
        for done in range(1, CALLS):
            update(done, CALLS - 1)
    return stream.getvalue()


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run(monkeypatch, io.StringIO()).splitlines(keepends=True)
    assert 5 < len(lines) < 12
    assert lines[0] == "name: 10%, 100 of 999 items, 10 s\n"
    assert lines[-1] == "name: 100%, 999 of 999 items, 100 s\n"


def test_a_terminal_gets_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    shown = run(monkeypatch, Terminal())
    assert "\rname: 100%" in shown
    assert shown.count("\n") == 1


def test_without_tqdm_a_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert run(monkeypatch, Terminal()).endswith("name: 100%, 999 of 999 items, 100 s\n")
