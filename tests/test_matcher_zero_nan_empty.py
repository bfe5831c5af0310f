"""Zero maps score as any others, NaN stays in the scores that it belongs to, and an empty batch has empty scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from eager import Eager
from inputs import DEVICE, LABELS, C, H, K, N, W, gradient_of, ids, make_class_matcher, make_matcher, maps
from tolerances import assert_close
from torch import Tensor


@pytest.mark.parametrize("kind", ["classes", "gallery"])
def test_zero_maps_give_no_nan(backend: str, kind: str) -> None:
    matcher = make_class_matcher()
    feature = maps(len(LABELS), 1)
    feature[0] = 0.0
    feature[1, :, 1, 2] = 0.0
    gallery = maps(3, 3)
    gallery[2] = 0.0
    assert matcher.class_embed is not None
    with torch.no_grad():
        matcher.class_embed[1] = 0.0
        matcher.class_embed[3, :, 0, 0] = 0.0
    eager = Eager(matcher)
    for values in (feature, gallery):
        values.requires_grad_()
    if kind == "gallery":
        scores, expected = matcher(feature, gallery), eager(feature.detach().double(), gallery.detach().double())
    else:
        matcher.class_neighbors = eager.neighbors()  # zero vectors are all equally far: ties are not tested here
        labels = ids(LABELS)
        scores, expected = matcher(feature, labels=labels), eager(feature.detach().double(), labels=labels)
    assert_close(scores, expected, torch.float32)
    scores.square().sum().backward()
    assert gradient_of(feature).isfinite().all()
    assert gradient_of(feature)[0].eq(0).all()
    assert gradient_of(feature)[2].abs().max() > 0
    table, zero = (gallery, 2) if kind == "gallery" else (matcher.class_embed, 1)
    assert gradient_of(table).isfinite().all()
    assert gradient_of(table)[zero].eq(0).all()


def test_input_of_zeros_alone_has_finite_scores() -> None:
    matcher = make_matcher()
    zeros = torch.zeros(4, C, H, W, device=DEVICE, requires_grad=True)
    scores = matcher(zeros, "same", prob_occ=torch.zeros(4, 1, H, W, device=DEVICE))
    scores.square().sum().backward()
    assert scores.isfinite().all()
    assert torch.equal(gradient_of(zeros), torch.zeros_like(zeros))


@pytest.mark.parametrize("kind", ["classes", "every class", "gallery", "same", "match", "match_pairs"])
def test_nan_stays_in_its_row(kind: str) -> None:
    matcher = make_class_matcher(mode="eval")
    clean, gallery, labels = maps(len(LABELS), 1), maps(len(LABELS), 3), ids([3, 3, 3, 7, 1])
    broken = clean.clone()
    broken[1, 2, 0, 1] = torch.nan

    def score(feature: Tensor) -> Tensor:
        calls: dict[str, Callable[[], Tensor]] = {
            "classes": lambda: matcher.class_scores(feature, labels).values,
            "every class": lambda: matcher(feature),
            "gallery": lambda: matcher(feature, gallery),
            "same": lambda: matcher(feature, "same"),
            "match": lambda: matcher.match(feature, gallery),
            "match_pairs": lambda: matcher.match_pairs(feature, gallery).unsqueeze(1),
        }
        return calls[kind]()

    expected, actual = score(clean), score(broken)
    expected[1] = torch.nan
    if kind == "same":
        expected[:, 1] = torch.nan
    assert_close(actual, expected, torch.float32)


def test_nan_in_a_gallery_item_or_class_stays_in_its_column(backend: str) -> None:
    matcher = make_class_matcher(mode="eval")
    probe, gallery, labels = maps(len(LABELS), 1), maps(4, 3), ids(LABELS)
    broken = gallery.clone()
    broken[2, 0, 1, 1] = torch.nan
    with torch.no_grad():
        expected = matcher(probe, gallery)
        expected[:, 2] = torch.nan
        assert_close(matcher(probe, broken), expected, torch.float32)

        expected = matcher(probe, labels=labels)
        assert matcher.class_neighbors is not None
        assert matcher.class_embed is not None
        column = int(matcher.class_neighbors[3, 0])
        matcher.class_embed[column, 1, 0, 2] = torch.nan
        scored = (matcher.class_neighbors[labels] == column).any(1)
        assert scored.any()
        expected[scored, column] = torch.nan
        assert_close(matcher(probe, labels=labels), expected, torch.float32)


def test_nan_in_a_training_batch_is_not_hidden() -> None:
    feature = maps(4, 1)
    feature[1, 2, 0, 1] = torch.nan
    assert make_matcher()(feature, maps(3, 3)).isnan().all()  # it is in the statistics of the whole batch


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("gradient", [False, True], ids=["no_grad", "grad"])
def test_empty_batches(backend: str, mode: str, gradient: bool) -> None:
    matcher = make_class_matcher(mode=mode)
    before = {name: value.clone() for name, value in matcher.state_dict().items()}
    empty, some = torch.zeros(0, C, H, W, device=DEVICE, requires_grad=gradient), maps(3, 3).requires_grad_(gradient)
    no_labels, visible = torch.zeros(0, dtype=torch.int64, device=DEVICE), torch.zeros(0, 1, H, W, device=DEVICE)
    with torch.set_grad_enabled(gradient):
        results = {
            "classes": (matcher(empty, labels=no_labels, prob_occ=visible), (0, N)),
            "compact": (matcher.class_scores(empty, no_labels).values, (0, K)),
            "every class": (matcher(empty), (0, N)),
            "P": (matcher(empty, some), (0, 3)),
            "G": (matcher(some, empty, gal_occ=visible), (3, 0)),
            "P and G": (matcher(empty, empty), (0, 0)),
            "same": (matcher(empty, "same"), (0, 0)),
            "match P": (matcher.match(empty, some), (0, 3)),
            "match G": (matcher.match(some, empty), (3, 0)),
            "match_pairs": (matcher.match_pairs(empty, empty), (0,)),
        }
    for name, (scores, shape) in results.items():
        assert scores.shape == shape, name
        assert scores.dtype == torch.float32, name
    assert all(torch.equal(value, before[name]) for name, value in matcher.state_dict().items())
    sparse = matcher.class_scores(empty, no_labels).to_sparse()
    assert sparse.shape == (0, N)
    if gradient:
        weights = [weight for name, weight in matcher.named_parameters() if name != "class_embed"]
        assert len(weights) == 6
        for name, (scores, _) in results.items():
            if "match" not in name:  # DistributedDataParallel waits for the gradients of every rank
                found = torch.autograd.grad(scores.sum(), weights, retain_graph=True)
                assert not any(part.any() for part in found), name
        sum(scores.sum() for name, (scores, _) in results.items() if "match" not in name).backward()  # type: ignore[union-attr]
        assert gradient_of(empty).shape == (0, C, H, W)
        assert some.grad is None or torch.equal(some.grad, torch.zeros_like(some))
