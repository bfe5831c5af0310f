"""Progress of a long computation on standard error: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from time import perf_counter
from typing import Any

SECONDS_BETWEEN_LINES = 10.0
Progress = Callable[[int, int], None]  # called with what is done and what there is to do, 0 if that is not known
progress_of_search: ContextVar[Progress | None] = ContextVar("progress_of_search", default=None)


@contextmanager
def progress_reported_to(progress: bool | Progress) -> Iterator[None]:
    """Within the context, searches report to `progress`, a function; with True they are shown.

    A context variable carries the function to the search, for a torch op takes no functions.
    """
    if progress is False:
        yield
        return
    with ExitStack() as stack:
        report = stack.enter_context(show_progress("class graph", "tiles")) if progress is True else progress
        token = progress_of_search.set(report)
        stack.callback(progress_of_search.reset, token)
        yield


@contextmanager
def show_progress(name: str, unit: str, *, shown: bool = True) -> Iterator[Progress]:
    """Show how far a computation is, for as long as the context lasts.

    A bar needs tqdm; without it lines are written everywhere.

    Args:
        name: of the computation.
        unit: of what it does, in the plural.
        shown: where False, nothing is.

    Yields:
        A function to call with what is done and what there is to do.
    """
    if not shown:
        yield lambda done, total: None
        return
    tqdm = _tqdm()
    if tqdm is None:
        yield _lines(name, unit)
        return
    with tqdm(desc=name, unit=f" {unit}", unit_scale=True) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        yield update


def _tqdm() -> Any:
    """The class of bars, None where none can be drawn: in a file, a pipe or the log of a CI system."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    is_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    return tqdm if is_notebook or sys.stderr.isatty() else None


def _lines(name: str, unit: str) -> Progress:
    started = last = perf_counter()

    def update(done: int, total: int) -> None:
        nonlocal last
        now = perf_counter()
        if 0 < total <= done or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            share = f"{done / total:.0%}, {done:,} of {total:,}" if total else f"{done:,}"
            sys.stderr.write(f"{name}: {share} {unit}, {now - started:.0f} s\n")
            sys.stderr.flush()

    return update
