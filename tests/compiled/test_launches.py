"""The library's own kernels, whole and broken, where kernels are emulated: `make test-compiled`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

if os.environ.get("QACONV_TESTS_KERNELS") != "emulated":
    pytest.skip("kernels are not emulated", allow_module_level=True)

import torch
from static import launches
from torch.nn import functional as F

from qaconv_triton import functional, ops
from qaconv_triton.kernels import max_correlation, topk_search

from . import hooks
from .launch import EmulationError, Kernel
from .translate import translate


@pytest.mark.slow
def test_every_launch_translates() -> None:
    """At the sizes that the library is tuned for."""
    known = set()
    for case in launches.cases():
        recorder, _ = launches.record(case)
        if launches.compile_key(recorder) not in known:
            known.add(launches.compile_key(recorder))
            translate(launches.compile_for(recorder, "sm_80").asm["ptx"])
    assert len(known) > 70


KERNELS = (max_correlation._forward_kernel, topk_search._append_kernel)


def forget_compiled() -> None:
    for kernel in KERNELS:
        kernel.device_caches.clear()


def search() -> None:
    functional.class_neighbors(torch.randn(150, 200), 3)


def correlate() -> None:
    maps = [F.normalize(torch.randn(3, 200, 5, 4), dim=1) for _ in range(2)]
    ops.max_correlation(*maps, None, None, False, False)


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels, compiled anew in each test."""
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "triton")
    forget_compiled()
    yield
    forget_compiled()


@pytest.mark.parametrize("launch", [search, correlate])
@pytest.mark.parametrize(
    ("removed", "error"),
    [("bar.sync \t0;", "another warp accessed"), ("cp.async.wait_group", "a copy is not waited for")],
)
def test_what_keeps_threads_in_step_is_needed(
    monkeypatch: pytest.MonkeyPatch, launch: Callable[[], None], removed: str, error: str
) -> None:
    launch()

    def broken(text: str, num_warps: int, shared_bytes: int) -> Kernel:
        assert removed in text
        return Kernel(text.replace(removed, f"// {removed}"), num_warps, shared_bytes)

    monkeypatch.setattr(hooks, "Kernel", broken)
    forget_compiled()
    with pytest.raises(EmulationError, match=error):
        launch()
