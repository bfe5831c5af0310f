"""A call that fails or is interrupted midway leaves the matcher as it was, and the next call is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from errors import class_matcher, features, labels, refused
from inputs import C, H, N, W
from torch import Tensor

from qaconv_triton import ClassScores, QAConv
from qaconv_triton import head as head_module

Call = Callable[[QAConv], Any]

CALLS: dict[str, Call] = {
    "labels": lambda matcher: matcher(features(), labels=labels()),
    "class_scores": lambda matcher: matcher.class_scores(features(), labels()),
    "all classes": lambda matcher: matcher(features()),
    "gallery": lambda matcher: matcher(features(), features(seed=2)),
    "same": lambda matcher: matcher(features(), "same"),
}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_failure_between_the_norms_updates_neither(
    call: Call, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out after `bn` and before `logit_bn`; the step is tried again, and must count once."""
    matcher, expected = class_matcher(), class_matcher()
    original, calls = head_module._statistics, []

    def failing(values: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        calls.append(values.dim())
        if len(calls) == 2:
            raise error("out of memory")
        return original(values, norm)

    monkeypatch.setattr(head_module, "_statistics", failing)
    with refused(error, ("out of memory",), matcher):
        call(matcher)
    assert calls == [3, 2]  # pooled values, then logits
    monkeypatch.undo()
    call(matcher)
    call(expected)
    for name, buffer in expected.named_buffers():
        assert torch.equal(matcher.get_buffer(name), buffer), name
    assert matcher.bn.num_batches_tracked == 1


def test_a_failure_after_the_scores_updates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = class_matcher()

    def failing(scores: ClassScores, fill: float = 0.0) -> Tensor:
        raise MemoryError("dense scores")

    monkeypatch.setattr(ClassScores, "to_dense", failing)
    with refused(MemoryError, ("dense scores",), matcher):
        matcher(features(), labels=labels())


def test_a_failed_call_leaves_the_kernel_and_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = class_matcher()
    matcher.make_kernel(features(3, C, H, W))

    def failing(*_: Any) -> None:
        raise MemoryError("statistics")

    monkeypatch.setattr(torch, "_foreach_copy_", failing)
    with refused(MemoryError, ("statistics",), matcher):
        matcher(features())


@pytest.mark.parametrize("target", [None, labels()], ids=["all classes", "labels"])
def test_the_visibility_warning_as_an_error_comes_before_the_update(target: Tensor | None) -> None:
    matcher, visible = class_matcher(), torch.ones(N, 1, H, W)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with refused(UserWarning, ("gal_occ",), matcher):
                matcher(features(), labels=target, gal_occ=visible)


def test_a_warning_is_still_given_after_a_call_that_failed() -> None:
    matcher = class_matcher()
    visible = torch.ones(N, 1, H, W)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with refused(IndexError, ("[8]",), matcher):
            matcher(features(), labels=labels(3, 8, 0, 1), gal_occ=visible)
    assert caught == []
    with pytest.warns(UserWarning, match="gal_occ"):
        matcher(features(), labels=labels(), gal_occ=visible)
