"""The running statistics of QAConv: one update a forward, over the whole call, and none where there should be none."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from eager import Eager, assert_as_eager, class_inputs, gallery_inputs
from inputs import DEVICE, ids, make_class_matcher, make_matcher, maps
from tolerances import assert_all_close, assert_close
from torch import nn
from torch.utils.checkpoint import checkpoint


def test_statistics_do_not_depend_on_the_order_of_pairs() -> None:
    inputs = gallery_inputs(torch.float64, occluded=True)
    probes, galleries = ids([2, 0, 3, 1]), ids([1, 2, 0])
    plain, shuffled = make_matcher(torch.float64), make_matcher(torch.float64)
    expected = plain(**inputs)
    actual = shuffled(
        inputs["prob_fea"][probes],
        inputs["gal_fea"][galleries],
        prob_occ=inputs["prob_occ"][probes],
        gal_occ=inputs["gal_occ"][galleries],
    )
    assert_close(actual, expected[probes][:, galleries], torch.float64)
    assert_all_close(dict(shuffled.named_buffers()), dict(plain.named_buffers()), torch.float64)

    classes = class_inputs(torch.float64, occluded=True)
    order = ids([4, 2, 0, 1, 3])
    plain, shuffled = (make_class_matcher(torch.float64) for _ in range(2))
    expected = plain(**classes)
    actual = shuffled(classes["prob_fea"][order], labels=classes["labels"][order], prob_occ=classes["prob_occ"][order])
    assert_close(actual, expected[order], torch.float64)
    assert_all_close(dict(shuffled.named_buffers()), dict(plain.named_buffers()), torch.float64)


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_one_update_per_forward(momentum: float | None) -> None:
    matcher = make_class_matcher(torch.float64)
    matcher.bn.momentum = matcher.logit_bn.momentum = momentum  # type: ignore[assignment]
    eager = Eager(matcher)
    gallery, classes = gallery_inputs(torch.float64, occluded=True), class_inputs(torch.float64, occluded=False)
    for updates, inputs in enumerate((gallery, classes, classes | {"labels": None}, gallery), start=1):
        matcher(**inputs)
        eager(**inputs)
        assert_all_close(dict(matcher.named_buffers()), dict(eager.named_buffers()), torch.float64)
        assert matcher.bn.num_batches_tracked == updates
        assert matcher.logit_bn.num_batches_tracked == updates
    matcher.class_scores(classes["prob_fea"], classes["labels"])
    assert matcher.bn.num_batches_tracked == 5


def test_eval_mode_leaves_them_alone() -> None:
    matcher = make_class_matcher(torch.float64, "eval")
    before = {name: value.clone() for name, value in matcher.state_dict().items()}
    gallery, classes = gallery_inputs(torch.float64, occluded=True), class_inputs(torch.float64, occluded=True)
    alone = matcher(gallery["prob_fea"][:1], gallery["gal_fea"][:1])
    together = matcher(gallery["prob_fea"], gallery["gal_fea"])
    matcher(**classes)
    assert_close(alone, together[:1, :1], torch.float64)  # no pair sees another
    assert all(torch.equal(value, before[name]) for name, value in matcher.state_dict().items())


def test_frozen_bn_is_not_updated() -> None:
    matcher = make_matcher(torch.float64, "frozen bn")
    matcher(**gallery_inputs(torch.float64, occluded=False))
    assert matcher.bn.running_mean == 0.4
    assert matcher.bn.num_batches_tracked == 0
    assert matcher.logit_bn.num_batches_tracked == 1


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_without_running_statistics_those_of_the_batch_count(mode: str) -> None:
    matcher = make_matcher(torch.float64, mode)
    matcher.bn = nn.BatchNorm1d(1, track_running_stats=False).double().to(DEVICE).train(mode == "train")
    assert_as_eager(matcher, gallery_inputs(torch.float64, occluded=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_forward_counts_once(use_reentrant: bool) -> None:
    once, twice = make_class_matcher(), make_class_matcher()
    feature, labels = maps(4, 1).requires_grad_(), torch.arange(4, device=DEVICE)
    once(feature, labels=labels).sum().backward()
    checkpoint(partial(twice, labels=labels), feature, use_reentrant=use_reentrant).sum().backward()
    assert twice.bn.num_batches_tracked == 1
    assert all(torch.equal(value, once.state_dict()[name]) for name, value in twice.state_dict().items())
