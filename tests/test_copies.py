"""A copy of a loss or a matcher trains on as the original does, and on its own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from inputs import DEVICE, C, H, K, N, W, ids, make_class_matcher, maps
from loss_cases import TARGETS, training_step

from qaconv_triton import QAConv, SoftmaxTripletLoss

LABELS = TARGETS["pairs"]
B = len(LABELS)


def through_pickle(loss: SoftmaxTripletLoss) -> SoftmaxTripletLoss:
    loaded = pickle.loads(pickle.dumps(loss))
    assert isinstance(loaded, SoftmaxTripletLoss)
    return loaded


def through_file(loss: SoftmaxTripletLoss) -> SoftmaxTripletLoss:
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, SoftmaxTripletLoss)
    return loaded


def through_state_dict(loss: SoftmaxTripletLoss) -> SoftmaxTripletLoss:
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    other = SoftmaxTripletLoss(QAConv(C, H, W, num_classes=N, k_nearest=K, include_self=True).to(DEVICE))
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def through_clone(loss: SoftmaxTripletLoss) -> SoftmaxTripletLoss:
    return SoftmaxTripletLoss(loss.matcher.clone())


@pytest.mark.parametrize("make_copy", [copy.deepcopy, through_pickle, through_file, through_state_dict, through_clone])
def test_a_copy_trains_on_alike_and_on_its_own(make_copy: Callable[[SoftmaxTripletLoss], SoftmaxTripletLoss]) -> None:
    loss = SoftmaxTripletLoss(make_class_matcher(include_self=True))
    training_step(loss, maps(B, 1), ids(LABELS))
    graph = loss.matcher.class_neighbors
    copied = make_copy(loss)
    if make_copy is through_state_dict:
        assert copied.matcher.class_neighbors is None
    else:
        assert copied.matcher.class_neighbors is not graph
        assert torch.equal(copied.matcher.class_neighbors, graph)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    actual = training_step(copied, maps(B, 2), ids(LABELS))
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    expected = training_step(loss, maps(B, 2), ids(LABELS))
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())
    for parameter, own in zip(copied.parameters(), loss.parameters(), strict=True):
        assert parameter.data_ptr() != own.data_ptr()
        assert parameter.requires_grad
    assert type(copied.matcher) is QAConv


def test_clone_keeps_modes_options_and_dtype_but_no_kernel() -> None:
    matcher = make_class_matcher(torch.float64, include_self=True, sparse_grad=True, k_nearest=4)
    matcher.bn.eval()
    matcher.make_kernel(maps(2, 1, torch.float64).requires_grad_() * 2)
    for copied in (matcher.clone(), copy.deepcopy(matcher), pickle.loads(pickle.dumps(matcher))):
        assert (copied.training, copied.bn.training, copied.logit_bn.training) == (True, False, True)
        assert (copied.sparse_grad, copied.include_self, copied.k_nearest, copied.num_classes) == (True, True, 4, N)
        assert copied.fc.weight.dtype == torch.float64
        assert str(copied) == str(matcher)
        assert copied(maps(B, 1, torch.float64)).shape == (B, N)  # the kernel of a step is no part of the matcher
    assert matcher(maps(B, 1, torch.float64)).shape == (B, 2)
