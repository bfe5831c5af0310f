"""Invalid labels where values are not read back, as on CUDA: their rows are NaN, and count nowhere else."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from errors import META, class_matcher, features, labels, refused
from inputs import CPU, C, H, K, N, W, gradient_of, visibility
from tolerances import assert_all_close, assert_close
from torch import Tensor

from qaconv_triton import SoftmaxTripletLoss, validation
from qaconv_triton import matcher as matcher_module


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the branch of CUDA tensors: no value is looked at."""
    for module in (validation, matcher_module):
        monkeypatch.setattr(module, "values_may_be_read", lambda tensor: False)


def test_values_are_read_on_the_cpu_and_where_checks_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = torch.ones(1, device=META)  # stands for CUDA: not on the CPU
    monkeypatch.delenv(validation.CHECKS_VARIABLE, raising=False)
    assert validation.CHECKS_VARIABLE == "QACONV_TRITON_CHECKS"
    assert validation.values_may_be_read(torch.ones(1))
    assert not validation.values_may_be_read(elsewhere)
    for value, expected in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv(validation.CHECKS_VARIABLE, value)
        assert validation.values_may_be_read(elsewhere) is expected
        assert validation.values_may_be_read(torch.ones(1))
    assert os.environ[validation.CHECKS_VARIABLE] == ""


INVALID = {"first": [-1, 3, 3, 7, 1], "repeated": [3, 8, 3, 8, 1], "many": [-1, 99, 3, 7, -(2**40)]}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("values", "mode", "include_self", "sparse_grad"),
    [("first", "train", False, False), ("repeated", "eval", True, True), ("many", "frozen bn", True, False)],
)
def test_invalid_rows_are_nan_and_count_nowhere(
    values: str, mode: str, include_self: bool, sparse_grad: bool, cpu_backend: str
) -> None:
    """Scores, statistics and gradients are those of the batch without the invalid rows."""
    target = torch.tensor(INVALID[values])
    valid = (target >= 0) & (target < N)
    weight = features(len(target), K + include_self, seed=3)
    results = []
    for selected in (torch.ones_like(valid), valid):
        matcher = class_matcher(mode=mode, include_self=include_self, sparse_grad=sparse_grad)
        feature = features(len(target), C, H, W)[selected].requires_grad_()
        visible = visibility(len(target), 5, device=CPU)[selected].requires_grad_()
        scores = matcher.class_scores(feature, target[selected], visible)
        (scores.values * weight[selected]).nansum().backward()
        gradients = {name: gradient_of(parameter) for name, parameter in matcher.named_parameters()}
        assert (gradients["class_embed"].layout == torch.sparse_coo) == sparse_grad
        results.append(
            {
                "values": scores.values,
                "classes": scores.classes,
                "to features": gradient_of(feature),
                "to visibility": gradient_of(visible),
                **dict(matcher.named_buffers()),
                **{f"to {name}": gradient.to_dense() for name, gradient in gradients.items()},
            }
        )
    found, expected = results
    assert found["values"][~valid].isnan().all()
    assert (found["classes"][~valid] == -1).all()
    assert torch.equal(found["classes"][valid], expected["classes"])
    for name in ("to features", "to visibility"):
        assert found[name][~valid].eq(0).all()
        assert expected[name].abs().max() > 1e-3
    for name in ("values", "classes", "to features", "to visibility"):
        found[name] = found[name][valid]
    assert_all_close(found, expected, torch.float32)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("values", INVALID.values(), ids=INVALID.keys())
def test_invalid_rows_of_the_dense_scores_are_nan(values: list[int]) -> None:
    target = torch.tensor(values)
    valid = (target >= 0) & (target < N)
    dense = class_matcher()(features(len(values), C, H, W), labels=target)
    assert dense.shape == (len(values), N)
    assert dense[~valid].isnan().all()
    assert_close(
        dense[valid], class_matcher()(features(len(values), C, H, W)[valid], labels=target[valid]), torch.float32
    )


@pytest.mark.usefixtures("unread")
def test_gradients_are_finite_through_the_dense_scores() -> None:
    matcher = class_matcher()
    feature = features().requires_grad_()
    dense = matcher(feature, labels=labels(3, -1, 8, 7))
    dense.nan_to_num(0.0).square().sum().backward()
    assert gradient_of(feature).isfinite().all()
    assert gradient_of(feature)[[1, 2]].eq(0).all()
    assert gradient_of(feature)[[0, 3]].abs().max() > 0
    for name, parameter in matcher.named_parameters():
        assert gradient_of(parameter).isfinite().all(), name


@pytest.mark.usefixtures("unread")
def test_a_batch_of_invalid_labels_alone(cpu_backend: str) -> None:
    matcher = class_matcher()
    before = {name: value.clone() for name, value in matcher.state_dict().items() if "tracked" not in name}
    feature = features().requires_grad_()
    scores = matcher.class_scores(feature, labels(-1, 8, 9, -7)).values
    assert scores.isnan().all()
    scores.sum().backward()
    assert gradient_of(feature).eq(0).all()
    for name, parameter in matcher.named_parameters():
        assert parameter.grad is None or parameter.grad.eq(0).all(), name
    for name, value in before.items():
        assert torch.equal(matcher.state_dict()[name], value), name


def test_valid_labels_score_the_same_unread(request: pytest.FixtureRequest) -> None:
    def scores_and_statistics() -> dict[str, Tensor]:
        matcher = class_matcher()
        return {"scores": matcher(features(), labels=labels()), **dict(matcher.named_buffers())}

    read = scores_and_statistics()
    request.getfixturevalue("unread")
    assert_all_close(scores_and_statistics(), read, torch.float32)


@pytest.mark.usefixtures("unread")
def test_wrong_dtype_and_length_are_refused_unread_too() -> None:
    matcher = class_matcher()
    for bad, error in ((labels().float(), TypeError), (labels(1, 2), ValueError), (labels().to(META), ValueError)):
        with refused(error, ("labels",), matcher):
            matcher(features(), labels=bad)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("background", ["zero", "ignore"])
def test_the_loss_of_an_invalid_target_is_nan(background: Any) -> None:
    matcher = class_matcher(include_self=True)
    loss = SoftmaxTripletLoss(matcher, background=background)(features(), labels(3, -1, 3, 8))
    assert loss[0].isnan().tolist() == [False, True, False, True]
    assert loss[3].tolist()[1] == 0
    assert not loss[1].isnan().any()


@pytest.mark.cuda
def test_invalid_labels_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(validation.CHECKS_VARIABLE, raising=False)
    matcher = class_matcher().cuda()
    bad = labels(3, -1, 8, 7).cuda()
    dense = matcher(features().cuda(), labels=bad)
    assert dense.isnan().any(1).tolist() == [False, True, True, False]
    assert dense.isnan().all(1).tolist() == [False, True, True, False]
    monkeypatch.setenv(validation.CHECKS_VARIABLE, "1")
    with pytest.raises(IndexError, match=r"\[-1, 8\]"):
        matcher(features().cuda(), labels=bad)
