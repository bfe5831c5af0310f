"""`torch.compile` takes the losses whole, with the same outputs, gradients and statistics."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import N, ids, make_class_matcher, maps, visibility
from loss_cases import TARGETS, training_step
from tolerances import assert_all_close, assert_close

from qaconv_triton import SoftmaxTripletLoss

LABELS = TARGETS["pairs"]
B = len(LABELS)


@pytest.fixture
def fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nothing compiled earlier is used: not by this process, nor by one that knew the ops as they were."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_compiles(backend: str, **options: Any) -> None:
    loss = SoftmaxTripletLoss(make_class_matcher(**{"include_self": True, **options}))
    loss.matcher.compute_class_neighbors()
    copied = copy.deepcopy(loss)
    compiled = torch.compile(copied, fullgraph=True, backend=backend)
    visible = visibility(B, 3)
    for seed, labels in ((1, LABELS), (2, [1, 1, 0, 0, 5, 5])):  # again: same graph, moved statistics
        actual = training_step(compiled, maps(B, seed), ids(labels), visible)
        expected = training_step(loss, maps(B, seed), ids(labels), visible)
        actual = {name.replace("_orig_mod.", ""): value for name, value in actual.items()}
        assert_all_close(actual, expected, torch.float32)
    assert copied.matcher.bn.num_batches_tracked == 4
    assert float(expected["output 2"].std()) > 1e-2


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_training_step(backend: str) -> None:
    assert_compiles("aot_eager")


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_training_step_without_the_own_class() -> None:
    assert_compiles("aot_eager", include_self=False)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_training_step_by_inductor() -> None:
    assert_compiles("inductor")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_batches_of_other_sizes() -> None:
    loss = SoftmaxTripletLoss(make_class_matcher(include_self=True))
    loss.matcher.compute_class_neighbors()
    copied = copy.deepcopy(loss)
    compiled = torch.compile(copied, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (6, 4):
        target = ids(LABELS[:count])
        actual = training_step(compiled, maps(count, 1), target)
        actual = {name.replace("_orig_mod.", ""): value for name, value in actual.items()}
        assert_all_close(actual, training_step(loss, maps(count, 1), target), torch.float32)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_class_path_does_not_read_labels() -> None:
    """No value is looked at in a graph: invalid labels give rows of NaN there, on the CPU too."""
    matcher = make_class_matcher(include_self=True).eval()
    matcher.compute_class_neighbors()
    compiled = torch.compile(matcher, fullgraph=True, backend="aot_eager")
    expected = matcher(maps(3, 1), labels=ids([0, 3, 7]))
    actual = compiled(maps(3, 1), labels=ids([0, N, 7]))
    assert actual[1].isnan().all()
    assert_close(actual[[0, 2]], expected[[0, 2]], torch.float32)


@pytest.mark.usefixtures("fresh_compiler")
def test_graph_is_built_in_a_compiled_step() -> None:
    """Without fullgraph the lazy graph works too: it is computed outside of the compiled code."""
    matcher, expected = make_class_matcher(include_self=True), make_class_matcher(include_self=True)
    compiled = torch.compile(matcher, backend="aot_eager")
    actual = compiled(maps(B, 1), labels=ids(LABELS))
    assert_close(actual, expected(maps(B, 1), labels=ids(LABELS)), torch.float32)
    assert torch.equal(matcher.class_neighbors, expected.class_neighbors)  # type: ignore[arg-type]
