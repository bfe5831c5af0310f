"""Runs the programs of interpreted kernels in another order than Triton's interpreter does, or several at a time.

The interpreter runs the programs of a launch one after the other, so it hides what depends on their order. Within
`ordered` they run in a given order. Within `interleaved` several are under way at a time, and hand over to each other
at random, but by a seed, at every access to memory; stores and atomics of a block happen in two parts. `conflicts`
lists memory that one program stores and another one accesses, whatever the order.
"""

from __future__ import annotations

import inspect
import math
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter

Program = Callable[[], None]
MEMORY = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
IN_FLIGHT = 4  # programs that are under way at a time
PATIENCE = 60.0  # seconds after which a program that does not hand over is taken for dead


class _Deferred:
    """Stands in for a kernel's function: keeps the calls, one per program, and runs them when the last has come."""

    def __init__(self, function: Callable[..., None], run: Callable[[list[Program]], None]) -> None:
        self.function, self.run, self.programs = function, run, []  # type: ignore[var-annotated]
        self.__name__, self.__globals__ = function.__name__, function.__globals__
        self.__signature__ = inspect.signature(function)

    def __call__(self, **arguments: Any) -> None:
        builder = interpreter.interpreter_builder
        self.programs.append(partial(self._program, builder.grid_idx, arguments))
        if len(self.programs) == math.prod(builder.grid_dim):
            self.run(self.programs)

    def _program(self, index: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        interpreter.interpreter_builder.grid_idx = index
        self.function(**arguments)


@contextmanager
def scheduled(run: Callable[[list[Program]], None]) -> Iterator[None]:
    """Let `run` call the programs of every launch."""
    launch = interpreter.GridExecutor.__call__

    def deferred(executor: Any, *args: Any, **options: Any) -> None:
        executor.fn = _Deferred(executor.fn, run)
        launch(executor, *args, **options)

    with mock.patch.object(interpreter.GridExecutor, "__call__", deferred):
        yield


@contextmanager
def ordered(permute: Callable[[list[Program]], list[Program]]) -> Iterator[None]:
    """Run the programs of every launch one after the other in the order of `permute(programs)`."""

    def run(programs: list[Program]) -> None:
        for program in permute(programs):
            program()

    with scheduled(run):
        yield


def backwards(programs: list[Program]) -> list[Program]:
    return programs[::-1]


def shuffled(seed: int) -> Callable[[list[Program]], list[Program]]:
    generator = random.Random(seed)
    return lambda programs: generator.sample(programs, len(programs))


class _Abandoned(BaseException):
    """Ends a program whose launch has failed elsewhere."""


class _Interleaved:
    """Programs as threads, of which one runs at a time, until it accesses memory."""

    def __init__(self, seed: int) -> None:
        self.generator, self.lanes = random.Random(seed), np.random.default_rng(seed)
        self.returned, self.own = threading.Semaphore(0), threading.local()
        self.error: BaseException | None = None

    def run(self, programs: list[Program]) -> None:
        waiting, running = programs[::-1], []
        while waiting or running:
            while waiting and len(running) < IN_FLIGHT:
                running.append(self._started(waiting.pop()))
            turn = self.generator.choice(running)
            turn.baton.release()
            assert self.returned.acquire(timeout=PATIENCE), "a program does not hand over"
            if not turn.is_alive or self.error is not None:
                running.remove(turn)
                turn.thread.join()
            if self.error is not None:
                for other in running:
                    other.baton.release()
                    other.thread.join()
                error, self.error = self.error, None
                raise error

    def _started(self, program: Program) -> Any:
        turn = mock.Mock(spec=["thread", "baton", "is_alive"], baton=threading.Semaphore(0), is_alive=True)

        def work() -> None:
            self.own.baton = turn.baton
            turn.baton.acquire()
            try:
                if self.error is None:
                    program()
            except _Abandoned:
                pass
            except BaseException as error:  # whatever a kernel raises is for the thread that launched it
                self.error = error
            turn.is_alive = False
            self.returned.release()

        turn.thread = threading.Thread(target=work, daemon=True)
        turn.thread.start()
        return turn

    def hand_over(self) -> None:
        index = interpreter.interpreter_builder.grid_idx
        self.returned.release()
        assert self.own.baton.acquire(timeout=PATIENCE)
        if self.error is not None:
            raise _Abandoned
        interpreter.interpreter_builder.grid_idx = index

    def parts(self, mask: Any) -> list[Any]:
        """The lanes of a mask in two parts."""
        first = self.lanes.random(mask.data.shape) < 0.5
        return [interpreter.TensorHandle(mask.data.astype(bool) & part, mask.dtype) for part in (first, ~first)]


@contextmanager
def interleaved(seed: int) -> Iterator[None]:
    """Run several programs of every launch at a time; they hand over at random whenever they access memory."""
    threads = _Interleaved(seed)
    load, store, atomic, exchange = (getattr(interpreter.InterpreterBuilder, name) for name in MEMORY)

    def loads(builder: Any, *args: Any) -> Any:
        threads.hand_over()
        return load(builder, *args)

    def stores(builder: Any, pointers: Any, values: Any, mask: Any, *args: Any) -> None:
        for part in threads.parts(mask):
            threads.hand_over()
            store(builder, pointers, values, part, *args)

    def atomics(builder: Any, operation: Any, pointers: Any, values: Any, mask: Any, *args: Any) -> Any:
        found = None
        for part in threads.parts(mask):
            threads.hand_over()
            got = atomic(builder, operation, pointers, values, part, *args)
            found = got.data if found is None else np.where(part.data, got.data, found)
        return interpreter.TensorHandle(found, got.dtype)

    def exchanges(builder: Any, *args: Any) -> Any:
        threads.hand_over()
        return exchange(builder, *args)

    with (
        scheduled(threads.run),
        mock.patch.multiple(
            interpreter.InterpreterBuilder, **dict(zip(MEMORY, (loads, stores, atomics, exchanges), strict=True))
        ),
    ):
        yield


@contextmanager
def conflicts() -> Iterator[list[str]]:
    """Collect the kernels, by name, in which one program stores what another program loads, stores or counts in."""
    found: list[str] = []
    accesses: dict[str, dict[tuple[int, ...], list[Any]]] = {}
    load, store, atomic, _ = (getattr(interpreter.InterpreterBuilder, name) for name in MEMORY)
    launch = interpreter.GridExecutor.__call__

    def note(kind: str, builder: Any, pointers: Any, mask: Any) -> None:
        where = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]  # some masks are integers
        accesses[kind][builder.grid_idx].append(np.unique(where))

    def loads(builder: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        note("load", builder, pointers, mask)
        return load(builder, pointers, mask, *args)

    def stores(builder: Any, pointers: Any, values: Any, mask: Any, *args: Any) -> None:
        note("store", builder, pointers, mask)
        store(builder, pointers, values, mask, *args)

    def atomics(builder: Any, operation: Any, pointers: Any, values: Any, mask: Any, *args: Any) -> Any:
        note("atomic", builder, pointers, mask)
        return atomic(builder, operation, pointers, values, mask, *args)

    def programs_by_address(kind: str) -> dict[int, set[tuple[int, ...]]]:
        programs = defaultdict(set)
        for program, places in accesses[kind].items():
            for address in np.unique(np.concatenate(places)).tolist():
                programs[address].add(program)
        return programs

    def checked(executor: Any, *args: Any, **options: Any) -> None:
        accesses.update({kind: defaultdict(list) for kind in ("load", "store", "atomic")})
        launch(executor, *args, **options)
        stored = programs_by_address("store")
        others = [programs_by_address(kind) for kind in ("load", "atomic")]
        if any(len(owners.union(*(other.get(where, ()) for other in others))) > 1 for where, owners in stored.items()):
            found.append(executor.fn.__name__)

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", checked),
        mock.patch.multiple(
            interpreter.InterpreterBuilder, **dict(zip(MEMORY[:3], (loads, stores, atomics), strict=True))
        ),
    ):
        yield found
