"""The largest tensor that the class path and the matching make: no N x N, no S x S per pair, no second table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import CPU, DEVICE, S, make_matcher, maps
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qaconv_triton import QAConv
from qaconv_triton import scores as scores_module
from qaconv_triton.common import thresholds
from qaconv_triton.cpu import cosine_topk as cpu_topk
from qaconv_triton.cpu import max_correlation as cpu


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any tensor made meanwhile has in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        strided = [
            [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.layout == torch.strided]
            for values in ((args, kwargs), result)
        ]
        given = {value.untyped_storage().data_ptr() for value in strided[0]}
        for value in strided[1]:
            if value.untyped_storage().data_ptr() not in given:  # or else a view
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> LargestTensor:
    """The mode, which also looks into the ops."""
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "torch")
    mode = LargestTensor()

    def observed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with mode:
                return function(*args)

        return run

    matching = ((cpu, name) for name in ("max_correlation", "pair_sums", "max_correlation_backward"))
    for module, name in (*matching, (cpu_topk, "cosine_topk")):
        monkeypatch.setattr(module, name, observed(getattr(module, name)))
    return mode


def class_path_peak(mode: LargestTensor, classes: int) -> int:
    torch.manual_seed(0)
    mode.elements = 0
    matcher = QAConv(2, 4, 4, num_classes=classes, k_nearest=10)
    feature = maps(6, 1, shape=(2, 4, 4), device=CPU).requires_grad_()
    with mode:
        matcher(feature, labels=torch.arange(6)).square().sum().backward()
    return mode.elements


def test_class_path_never_holds_all_similarities_or_correlations(
    monkeypatch: pytest.MonkeyPatch, largest: LargestTensor
) -> None:
    """On the CPU: on CUDA plain torch sorts the similarity in strips of the workspace."""
    monkeypatch.setattr(cpu, "MAX_CORRELATIONS", 2**9)
    for name, size in (("TILE", 32), ("BLOCK_ROWS", 64), ("BLOCK_COLUMNS", 128)):
        monkeypatch.setattr(cpu_topk, name, size)
    monkeypatch.setattr(thresholds, "MAX_ELEMENTS", 2**13)
    monkeypatch.setattr(cpu_topk, "MAX_ELEMENTS", 2**13)
    few, many = class_path_peak(largest, 600), class_path_peak(largest, 1200)
    assert many >= 1200 * 2 * 16  # the table's gradient: the mode does see things
    assert many < 1200 * 1200 // 10
    assert few * 1.5 < many < few * 2.5  # grows with N, not N * N
    correlations = 6 * 10 * 16 * 16
    matcher = QAConv(2, 4, 4, num_classes=20, k_nearest=10)
    matcher.compute_class_neighbors()
    feature = maps(6, 1, shape=(2, 4, 4), device=CPU).requires_grad_()
    largest.elements = 0
    with largest:
        matcher(feature, labels=torch.arange(6)).square().sum().backward()
    pooled = 6 * 10 * 2 * 16
    assert pooled <= largest.elements <= 1.5 * pooled < correlations / 5


def test_sparse_step_never_holds_another_table(monkeypatch: pytest.MonkeyPatch, largest: LargestTensor) -> None:
    """With the graph at hand, a step touches the rows it needs only."""
    monkeypatch.setattr(cpu, "MAX_CORRELATIONS", 2**9)
    matcher = QAConv(2, 4, 4, num_classes=5000, k_nearest=10, sparse_grad=True).to(DEVICE)
    matcher.class_neighbors = (torch.arange(1, 11).repeat(5000, 1) + torch.arange(5000)[:, None]).to(DEVICE) % 5000
    feature, labels = maps(6, 1, shape=(2, 4, 4)).requires_grad_(), torch.arange(6, device=DEVICE)
    largest.elements = 0
    with largest:
        matcher.class_scores(feature, labels).values.square().sum().backward()
    assert 6 * 10 * 2 * 16 <= largest.elements < 5000


def test_match_holds_no_pooled_values(monkeypatch: pytest.MonkeyPatch, largest: LargestTensor) -> None:
    monkeypatch.setattr(cpu, "MAX_CORRELATIONS", 2**9)
    monkeypatch.setattr(scores_module, "MAP_BYTES", 4 * 1000)
    matcher, probe, gallery = make_matcher(), maps(30, 1), maps(40, 3)
    with largest:
        scores = matcher.match(probe, gallery)
    assert scores.shape == (30, 40)
    assert 1200 <= largest.elements <= 1500 < 30 * 40 * 2 * S / 5
