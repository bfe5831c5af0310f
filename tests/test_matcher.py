"""QAConv against an eager fp64 model of it: values, running statistics, gradients, dtypes, bad days."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from eager import (
    DEVICE,
    LABELS,
    C,
    Eager,
    H,
    K,
    N,
    S,
    W,
    assert_as_eager,
    assert_close,
    build,
    class_inputs,
    gallery_inputs,
    gradients,
    ids,
    leaves,
    maps,
    visibility,
    with_modes,
    with_occlusion,
    with_own_class,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qaconv_triton import QAConv
from qaconv_triton import scores as scores_module
from qaconv_triton.cpu import max_correlation as cpu

# --- scores, statistics and gradients ---------------------------------------------------------------------------------


@with_modes
@with_own_class
def test_class_path(backend: str, mode: str, include_self: bool) -> None:
    matcher = build(mode=mode, num_classes=N, k_nearest=K, include_self=include_self)
    assert_as_eager(matcher, class_inputs(torch.float32, occluded=include_self))


@with_modes
@with_own_class
@with_occlusion
def test_class_path_in_double(mode: str, include_self: bool, occluded: bool) -> None:
    matcher = build(torch.float64, mode, num_classes=N, k_nearest=K, include_self=include_self)
    assert_as_eager(matcher, class_inputs(torch.float64, occluded))


@with_occlusion
def test_every_class(backend: str, occluded: bool) -> None:
    inputs = class_inputs(torch.float32, occluded) | {"labels": None}
    assert_as_eager(build(num_classes=N, k_nearest=K), inputs)


@with_modes
def test_every_class_in_double(mode: str) -> None:
    inputs = class_inputs(torch.float64, occluded=True) | {"labels": None}
    assert_as_eager(build(torch.float64, mode, num_classes=N, k_nearest=K), inputs)


@with_modes
def test_gallery(backend: str, mode: str) -> None:
    assert_as_eager(build(mode=mode), gallery_inputs(torch.float32, occluded=True))


@with_modes
@with_occlusion
def test_gallery_in_double(mode: str, occluded: bool) -> None:
    assert_as_eager(build(torch.float64, mode), gallery_inputs(torch.float64, occluded))


@with_occlusion
def test_same(backend: str, occluded: bool) -> None:
    inputs: dict[str, Any] = {"prob_fea": maps(4, 1), "gal_fea": "same"}
    if occluded:  # the same maps need not be the same visibility
        inputs |= {"prob_occ": visibility(4, 2), "gal_occ": visibility(4, 4)}
    assert_as_eager(build(), inputs)


def test_same_with_one_visibility_for_both_sides() -> None:
    """The losses pass one tensor twice: its gradient is the sum over both axes."""
    matcher = build(torch.float64)
    eager = Eager(matcher)
    results = []
    for module in (matcher, eager):
        feature, visible = maps(4, 1, torch.float64).requires_grad_(), visibility(4, 2, torch.float64).requires_grad_()
        scores = module(feature, "same", prob_occ=visible, gal_occ=visible)
        results.append({"scores": scores, **gradients(scores, {"feature": feature, "visible": visible}, module)})
    for name, expected in results[1].items():
        if expected is not None:
            found = results[0][name]
            assert found is not None
            assert_close(found, expected, 1e-9, name)


def test_only_one_side_is_occluded(backend: str) -> None:
    for left_out in ("prob_occ", "gal_occ"):
        inputs = gallery_inputs(torch.float32, occluded=True)
        del inputs[left_out]
        assert_as_eager(build(), inputs)


def test_labels_mean_nothing_beside_a_gallery() -> None:
    matcher = build(mode="eval", num_classes=N, k_nearest=K)
    inputs = gallery_inputs(torch.float32, occluded=False)
    assert torch.equal(matcher(**inputs, labels=ids([0, 1, 2, 3])), matcher(**inputs))
    assert matcher.class_neighbors is None


def test_arguments_go_by_position() -> None:
    """Scripts written for QAConv pass them in this order."""
    matcher = build(mode="eval", num_classes=N, k_nearest=K)
    inputs = gallery_inputs(torch.float32, occluded=True)
    by_position = matcher(inputs["prob_fea"], inputs["gal_fea"], None, inputs["prob_occ"], inputs["gal_occ"])
    assert torch.equal(by_position, matcher(**inputs))
    assert QAConv(C, H, W, N, K).k_nearest == K
    classes = class_inputs(torch.float32, occluded=True)
    by_position = matcher(classes["prob_fea"], None, classes["labels"], classes["prob_occ"], None)
    assert torch.equal(by_position, matcher(**classes))


@pytest.mark.parametrize("kind", ["gallery", "classes"])
def test_visibility_may_lack_the_channel_axis(backend: str, kind: str) -> None:
    matcher = build(mode="eval", num_classes=N, k_nearest=K)
    inputs = (gallery_inputs if kind == "gallery" else class_inputs)(torch.float32, occluded=True)
    squeezed = {name: value.squeeze(1) if name.endswith("occ") else value for name, value in inputs.items()}
    results = []
    for version in (inputs, squeezed):
        ready = leaves(version, torch.float32)
        scores = matcher(**ready)
        scores.square().sum().backward()
        results.append((scores, ready["prob_occ"].grad.reshape(-1)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].abs().max() > 0


def test_visibility_acts_on_its_own_axis(backend: str) -> None:
    """With a head that reads one location s only, hiding it leaves a constant: on the probe, not on the gallery."""
    matcher = build(mode="eval")
    hidden, probe, gallery = 4, maps(4, 1), maps(3, 3)
    veil = torch.ones(4, 1, H, W, device=DEVICE)
    veil.view(4, S)[:, hidden] = 0.0
    for half, name in ((0, "prob_occ"), (1, "gal_occ")):
        with torch.no_grad():
            matcher.fc.weight.zero_()
            matcher.fc.weight[0, half * S + hidden] = 1.0
        scores = matcher(probe, gallery, **{name: veil[: len(probe) if name == "prob_occ" else len(gallery)]})
        other = "gal_occ" if name == "prob_occ" else "prob_occ"
        swapped = matcher(probe, gallery, **{other: veil[: len(probe) if other == "prob_occ" else len(gallery)]})
        assert float(scores.detach().std()) < 1e-6
        assert float(swapped.detach().std()) > 1e-2
        # and the constant is that of a correlation of zero
        norms = matcher.bn, matcher.logit_bn
        value = torch.zeros(2, 1, device=DEVICE)
        with torch.no_grad():
            value = norms[1](norms[0](value) + matcher.fc.bias)
        assert_close(scores, value[0].expand_as(scores), 1e-5)


def test_match_is_eval_mode_without_gradients(backend: str) -> None:
    matcher = build()
    inputs = gallery_inputs(torch.float32, occluded=True)
    before = {name: value.clone() for name, value in matcher.state_dict().items()}
    ready = leaves(inputs, torch.float32)
    actual = matcher.match(ready["prob_fea"], ready["gal_fea"], ready["prob_occ"], ready["gal_occ"])
    assert not actual.requires_grad
    assert matcher.training
    assert matcher.bn.training
    assert matcher.logit_bn.training
    assert all(torch.equal(value, before[name]) for name, value in matcher.state_dict().items())
    eager = Eager(matcher).eval()
    assert_close(actual, eager(**leaves(inputs, torch.float64)), 2e-4)
    matcher.bn.eval()
    matcher.match(inputs["prob_fea"], inputs["gal_fea"])
    assert (matcher.training, matcher.bn.training, matcher.logit_bn.training) == (True, False, True)


@pytest.mark.parametrize("count", [1, 4, 300])
def test_match_pairs_is_the_diagonal_of_match(count: int) -> None:
    matcher = build(torch.float64)
    features = maps(count, 1, torch.float64), maps(count, 3, torch.float64)
    visible = visibility(count, 2, torch.float64), visibility(count, 4, torch.float64)
    diagonal = matcher.match_pairs(*features, *visible)
    assert diagonal.shape == (count,)
    assert not diagonal.requires_grad
    assert matcher.training
    assert_close(diagonal, matcher.match(*features, *visible).diagonal(), 1e-12)
    assert_close(matcher.match_pairs(*features), matcher.match(*features).diagonal(), 1e-12)


def test_match_pairs_on_the_kernels(backend: str) -> None:
    matcher = build()
    features, visible = (maps(4, 1), maps(4, 3)), (visibility(4, 2), visibility(4, 4))
    assert_close(matcher.match_pairs(*features, *visible), matcher.match(*features, *visible).diagonal(), 1e-5)


def test_make_kernel_serves_once() -> None:
    matcher = build(torch.float64, num_classes=N, k_nearest=K)
    inputs = gallery_inputs(torch.float64, occluded=True)

    def with_kernel(ready: dict[str, Any]) -> Tensor:
        matcher.make_kernel(ready["gal_fea"])
        scores: Tensor = matcher(ready["prob_fea"], prob_occ=ready["prob_occ"], gal_occ=ready["gal_occ"])
        return scores

    assert_as_eager(matcher, inputs, with_kernel)
    assert matcher(inputs["prob_fea"]).shape == (4, N)  # the classes again


def test_make_kernel_yields_to_a_gallery_and_waits() -> None:
    matcher = build(mode="eval")
    matcher.make_kernel(maps(2, 5))
    assert matcher(maps(4, 1), maps(3, 3)).shape == (4, 3)
    assert matcher(maps(4, 1)).shape == (4, 2)
    with pytest.raises(ValueError, match="num_classes"):
        matcher(maps(4, 1))


@with_own_class
def test_class_scores_compact_dense_and_sparse(backend: str, include_self: bool) -> None:
    matcher = build(num_classes=N, k_nearest=K, include_self=include_self)
    twin = matcher.clone()
    inputs = class_inputs(torch.float32, occluded=True)
    compact = matcher.class_scores(inputs["prob_fea"], inputs["labels"], inputs["prob_occ"])
    dense = twin(**inputs)
    width = K + include_self
    assert compact.values.shape == compact.classes.shape == (len(LABELS), width)
    assert compact.num_classes == N
    assert torch.equal(compact.classes, Eager(matcher).class_lists(inputs["labels"]))
    assert torch.equal(compact.to_dense(), dense)
    assert torch.equal(dense.gather(1, compact.classes), compact.values)
    scored = torch.zeros(len(LABELS), N, dtype=torch.bool, device=DEVICE).scatter(1, compact.classes, value=True)
    assert dense[~scored].eq(0).all()
    assert dense[scored].abs().min() > 0
    filled = compact.to_dense(fill=-torch.inf)
    assert torch.equal(filled[scored], dense[scored])
    assert torch.isneginf(filled[~scored]).all()
    sparse = compact.to_sparse()
    assert sparse.layout == torch.sparse_coo
    assert torch.equal(sparse.to_dense(), dense)
    assert sparse.coalesce().values().numel() == len(LABELS) * width
    assert torch.equal(matcher.bn.running_mean, twin.bn.running_mean)  # type: ignore[arg-type]


def test_class_scores_gradients_through_every_form() -> None:
    weight = torch.randn(len(LABELS), N, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(DEVICE)
    found = []
    for form in ("values", "dense", "sparse"):
        matcher = build(torch.float64, num_classes=N, k_nearest=K)
        inputs = leaves(class_inputs(torch.float64, occluded=True), torch.float64)
        compact = matcher.class_scores(inputs["prob_fea"], inputs["labels"], inputs["prob_occ"])
        if form == "values":
            total = (compact.values * weight.gather(1, compact.classes)).sum()
        elif form == "dense":
            total = (compact.to_dense() * weight).sum()
        else:
            total = (compact.to_sparse().to_dense() * weight).sum()
        total.backward()
        assert matcher.class_embed is not None
        found.append((inputs["prob_fea"].grad, inputs["prob_occ"].grad, matcher.class_embed.grad))
    for others in found[1:]:
        for actual, expected in zip(others, found[0], strict=True):
            assert expected.abs().max() > 1e-4
            assert_close(actual, expected, 1e-12)


# --- batch norm -------------------------------------------------------------------------------------------------------


def test_statistics_do_not_depend_on_the_order_of_pairs() -> None:
    inputs = gallery_inputs(torch.float64, occluded=True)
    probes, galleries = ids([2, 0, 3, 1]), ids([1, 2, 0])
    plain, shuffled = build(torch.float64), build(torch.float64)
    expected = plain(**inputs)
    actual = shuffled(
        inputs["prob_fea"][probes],
        inputs["gal_fea"][galleries],
        prob_occ=inputs["prob_occ"][probes],
        gal_occ=inputs["gal_occ"][galleries],
    )
    assert_close(actual, expected[probes][:, galleries], 1e-12)
    for name, buffer in plain.named_buffers():
        assert_close(shuffled.get_buffer(name), buffer, 1e-12, name)

    classes = class_inputs(torch.float64, occluded=True)
    order = ids([4, 2, 0, 1, 3])
    plain, shuffled = (build(torch.float64, num_classes=N, k_nearest=K) for _ in range(2))
    expected = plain(**classes)
    actual = shuffled(classes["prob_fea"][order], labels=classes["labels"][order], prob_occ=classes["prob_occ"][order])
    assert_close(actual, expected[order], 1e-12)
    for name, buffer in plain.named_buffers():
        if name != "class_neighbors":
            assert_close(shuffled.get_buffer(name), buffer, 1e-12, name)


@with_modes
@pytest.mark.parametrize("kind", ["classes", "every class", "gallery", "same"])
@pytest.mark.parametrize("block", [1, 100, 400])
def test_tiling_changes_nothing(monkeypatch: pytest.MonkeyPatch, mode: str, kind: str, block: int) -> None:
    """The eager model sees all pairs at once; so do the batch norms of every tiling, and the gradients."""
    monkeypatch.setattr(cpu, "MAX_CORRELATIONS", block)
    monkeypatch.setattr(cpu, "MAX_TERMS", block % 90)
    monkeypatch.setattr(scores_module, "MAP_BYTES", 4 * C * S * (block % 3))
    if kind == "gallery":
        inputs = gallery_inputs(torch.float64, occluded=True)
    elif kind == "same":
        inputs = {"prob_fea": maps(4, 1, torch.float64), "gal_fea": "same", "gal_occ": visibility(4, 2, torch.float64)}
    else:
        inputs = class_inputs(torch.float64, occluded=True)
        inputs["labels"] = inputs["labels"] if kind == "classes" else None
    assert_as_eager(build(torch.float64, mode, num_classes=N, k_nearest=K), inputs)
    with torch.no_grad():  # where pooled values may be dropped, tiles of pairs are scored one by one
        matcher = build(torch.float64, mode, num_classes=N, k_nearest=K)
        assert_close(matcher(**inputs), Eager(build(torch.float64, mode, num_classes=N, k_nearest=K))(**inputs), 1e-9)


@pytest.mark.parametrize("map_bytes", [1, 4 * C * S * 2, 4 * C * S * 100])
def test_match_in_tiles(monkeypatch: pytest.MonkeyPatch, map_bytes: int) -> None:
    matcher = build(torch.float64)
    arguments = tuple(gallery_inputs(torch.float64, occluded=True).values())
    expected = Eager(matcher).eval()(arguments[0], arguments[1], None, *arguments[2:])
    monkeypatch.setattr(scores_module, "MAP_BYTES", map_bytes)
    assert_close(matcher.match(*arguments), expected, 1e-9)


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, None])
def test_one_update_of_the_running_statistics_per_forward(momentum: float | None) -> None:
    matcher = build(torch.float64, num_classes=N, k_nearest=K)
    matcher.bn.momentum = matcher.logit_bn.momentum = momentum  # type: ignore[assignment]
    eager = Eager(matcher)
    gallery, classes = gallery_inputs(torch.float64, occluded=True), class_inputs(torch.float64, occluded=False)
    for updates, inputs in enumerate((gallery, classes, classes | {"labels": None}, gallery), start=1):
        matcher(**inputs)
        eager(**inputs)
        for name, buffer in eager.named_buffers():
            assert_close(matcher.get_buffer(name), buffer, 1e-9, name)
        assert matcher.bn.num_batches_tracked == updates
        assert matcher.logit_bn.num_batches_tracked == updates
    matcher.class_scores(classes["prob_fea"], classes["labels"])
    assert matcher.bn.num_batches_tracked == 5


def test_eval_mode_leaves_the_running_statistics_alone() -> None:
    matcher = build(torch.float64, "eval", num_classes=N, k_nearest=K)
    before = {name: value.clone() for name, value in matcher.state_dict().items()}
    gallery, classes = gallery_inputs(torch.float64, occluded=True), class_inputs(torch.float64, occluded=True)
    alone = matcher(gallery["prob_fea"][:1], gallery["gal_fea"][:1])
    together = matcher(gallery["prob_fea"], gallery["gal_fea"])
    matcher(**classes)
    assert_close(alone, together[:1, :1], 1e-12)  # no pair sees another
    assert all(torch.equal(value, before[name]) for name, value in matcher.state_dict().items())


def test_frozen_bn_is_not_updated() -> None:
    matcher = build(torch.float64, "frozen bn")
    matcher(**gallery_inputs(torch.float64, occluded=False))
    assert matcher.bn.running_mean == 0.4
    assert matcher.bn.num_batches_tracked == 0
    assert matcher.logit_bn.num_batches_tracked == 1


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_without_running_statistics_the_batch_counts(mode: str) -> None:
    matcher = build(torch.float64, mode)
    matcher.bn = nn.BatchNorm1d(1, track_running_stats=False).double().to(DEVICE).train(mode == "train")
    assert_as_eager(matcher, gallery_inputs(torch.float64, occluded=True))


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("module_dtype", ["same", "float32"])
@pytest.mark.parametrize("kind", ["classes", "every class", "gallery"])
def test_half_precision(backend: str, dtype: torch.dtype, module_dtype: str, kind: str) -> None:
    matcher = build(mode="eval", num_classes=N, k_nearest=K)
    if module_dtype == "same":
        matcher.to(dtype)
    if kind == "gallery":
        inputs = gallery_inputs(dtype, occluded=True)
    else:
        inputs = class_inputs(dtype, occluded=True)
        inputs["labels"] = inputs["labels"] if kind == "classes" else None
    eager = Eager(matcher)
    expected_inputs, actual_inputs = leaves(inputs, torch.float64), leaves(inputs, dtype)
    expected, actual = eager(**expected_inputs), matcher(**actual_inputs)
    assert actual.dtype == torch.float32
    error, spread = (actual.double() - expected).detach(), (expected - expected.mean()).detach()
    assert float(error.norm()) < 0.03 * float(spread.norm())
    actual_gradients = gradients(actual, actual_inputs, matcher)
    for name, gradient in gradients(expected, expected_inputs, eager).items():
        found = actual_gradients[name]
        if gradient is None:
            assert found is None, name
            continue
        assert found is not None, name
        assert found.dtype == (dtype if name in actual_inputs else matcher.fc.weight.dtype), name
        found = found.double().flatten()
        assert float(F.cosine_similarity(found, gradient.flatten(), dim=0)) > 0.999, name
        assert float(found.norm()) == pytest.approx(float(gradient.norm()), rel=0.03), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains(backend: str, dtype: torch.dtype) -> None:
    matcher = build(num_classes=N, k_nearest=K).to(dtype)
    eager = Eager(matcher)
    inputs = class_inputs(dtype, occluded=False)
    actual, expected = matcher(**inputs), eager(**leaves(inputs, torch.float64))
    scored = expected != 0
    error = (actual.double() - expected)[scored].detach()
    assert float(error.norm()) < 0.05 * float(expected.detach()[scored].norm())
    assert matcher.bn.running_mean is not None
    assert matcher.bn.running_mean.dtype == dtype
    for name, buffer in eager.named_buffers():
        assert_close(matcher.get_buffer(name), buffer, 0.02, name)


# --- zeros, NaN, nothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classes", "gallery"])
def test_zero_maps_give_no_nan(backend: str, kind: str) -> None:
    matcher = build(num_classes=N, k_nearest=K)
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
        matcher.class_neighbors = eager.neighbors()  # zero vectors are all equally far: ties, not the point here
        labels = ids(LABELS)
        scores, expected = matcher(feature, labels=labels), eager(feature.detach().double(), labels=labels)
    assert_close(scores, expected, 2e-4)
    scores.square().sum().backward()
    assert feature.grad is not None
    assert feature.grad.isfinite().all()
    assert feature.grad[0].eq(0).all()
    assert feature.grad[2].abs().max() > 0
    table = gallery if kind == "gallery" else matcher.class_embed
    assert table.grad is not None
    assert table.grad.isfinite().all()
    assert table.grad[2 if kind == "gallery" else 1].eq(0).all()


def test_all_zero_input_scores_alike(backend: str) -> None:
    matcher = build(num_classes=N, k_nearest=K)
    nothing = torch.zeros(4, C, H, W, device=DEVICE, requires_grad=True)
    scores = matcher(nothing, "same", prob_occ=torch.zeros(4, 1, H, W, device=DEVICE))
    scores.square().sum().backward()
    assert scores.isfinite().all()
    assert torch.equal(nothing.grad, torch.zeros_like(nothing))


@pytest.mark.parametrize("kind", ["classes", "every class", "gallery", "same", "match", "match_pairs"])
def test_nan_stays_in_its_row(backend: str, kind: str) -> None:
    matcher = build(mode="eval", num_classes=N, k_nearest=K)
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
    touched = torch.zeros_like(expected, dtype=torch.bool)
    touched[1] = True
    if kind == "same":
        touched[:, 1] = True
    assert actual[touched].isnan().all()
    assert_close(actual[~touched], expected[~touched], 1e-5)


def test_nan_in_a_gallery_item_or_class_stays_in_its_column(backend: str) -> None:
    matcher = build(mode="eval", num_classes=N, k_nearest=K)
    probe, gallery, labels = maps(len(LABELS), 1), maps(4, 3), ids(LABELS)
    broken = gallery.clone()
    broken[2, 0, 1, 1] = torch.nan
    expected, actual = matcher(probe, gallery), matcher(probe, broken)
    assert actual[:, 2].isnan().all()
    others = ids([0, 1, 3])
    assert_close(actual[:, others], expected[:, others], 1e-5)
    expected = matcher(probe, labels=labels)
    assert matcher.class_neighbors is not None
    assert matcher.class_embed is not None
    column = int(matcher.class_neighbors[3, 0])
    with torch.no_grad():
        matcher.class_embed[column, 1, 0, 2] = torch.nan
    actual = matcher(probe, labels=labels)
    scored = (matcher.class_neighbors[labels] == column).any(1)
    assert scored.any()
    assert actual[scored, column].isnan().all()
    actual[scored, column] = expected[scored, column]
    assert_close(actual, expected, 1e-5)


def test_nan_in_a_training_batch_is_not_hidden(backend: str) -> None:
    matcher = build()
    feature = maps(4, 1)
    feature[1, 2, 0, 1] = torch.nan
    assert matcher(feature, maps(3, 3)).isnan().all()  # it is in everyone's batch statistics


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("gradient", [False, True], ids=["no_grad", "grad"])
def test_empty_batches(backend: str, mode: str, gradient: bool) -> None:
    matcher = build(mode=mode, num_classes=N, k_nearest=K)
    before = {name: value.clone() for name, value in matcher.state_dict().items()}
    nothing, some = torch.zeros(0, C, H, W, device=DEVICE, requires_grad=gradient), maps(3, 3).requires_grad_(gradient)
    no_labels, veil = torch.zeros(0, dtype=torch.int64, device=DEVICE), torch.zeros(0, 1, H, W, device=DEVICE)
    with torch.set_grad_enabled(gradient):
        results = {
            "classes": (matcher(nothing, labels=no_labels, prob_occ=veil), (0, N)),
            "compact": (matcher.class_scores(nothing, no_labels).values, (0, K)),
            "every class": (matcher(nothing), (0, N)),
            "P": (matcher(nothing, some), (0, 3)),
            "G": (matcher(some, nothing, gal_occ=veil), (3, 0)),
            "P and G": (matcher(nothing, nothing), (0, 0)),
            "same": (matcher(nothing, "same"), (0, 0)),
            "match P": (matcher.match(nothing, some), (0, 3)),
            "match G": (matcher.match(some, nothing), (3, 0)),
            "match_pairs": (matcher.match_pairs(nothing, nothing), (0,)),
        }
    for name, (scores, shape) in results.items():
        assert scores.shape == shape, name
        assert scores.dtype == torch.float32, name
    assert all(torch.equal(value, before[name]) for name, value in matcher.state_dict().items())
    sparse = matcher.class_scores(nothing, no_labels).to_sparse()
    assert sparse.shape == (0, N)
    if gradient:
        weights = [weight for name, weight in matcher.named_parameters() if name != "class_embed"]
        assert len(weights) == 6
        for name, (scores, _) in results.items():
            if "match" not in name:  # DistributedDataParallel waits for the gradients of every rank
                found = torch.autograd.grad(scores.sum(), weights, retain_graph=True)
                assert not any(part.any() for part in found), name
        sum(scores.sum() for name, (scores, _) in results.items() if "match" not in name).backward()  # type: ignore[union-attr]
        assert nothing.grad is not None
        assert nothing.grad.shape == (0, C, H, W)
        assert some.grad is None or torch.equal(some.grad, torch.zeros_like(some))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_forward_counts_once(use_reentrant: bool) -> None:
    once, twice = build(num_classes=N, k_nearest=K), build(num_classes=N, k_nearest=K)
    feature, labels = maps(4, 1).requires_grad_(), torch.arange(4, device=DEVICE)
    once(feature, labels=labels).sum().backward()
    checkpoint(partial(twice, labels=labels), feature, use_reentrant=use_reentrant).sum().backward()
    assert twice.bn.num_batches_tracked == 1
    assert all(torch.equal(value, once.state_dict()[name]) for name, value in twice.state_dict().items())


# --- the import -------------------------------------------------------------------------------------------------------


def test_import_loads_no_compiler() -> None:
    """Every worker of a data loader pays for what an import pulls in: torch's compiler takes seconds."""
    script = (
        "import sys, torch; before = set(sys.modules); import qaconv_triton; "
        "print(*(name for name in ('torch._dynamo', 'torch._inductor', 'sympy', 'triton', 'numpy')"
        " if name in set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_class_path_ignores_gallery_visibility_with_one_warning() -> None:
    matcher = build(mode="eval", num_classes=N, k_nearest=K)
    inputs = class_inputs(torch.float32, occluded=True)
    expected, every = matcher(**inputs), matcher(inputs["prob_fea"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(matcher(**inputs, gal_occ=visibility(len(LABELS), 8)), expected)
            assert torch.equal(matcher(inputs["prob_fea"], gal_occ=visibility(N, 8)), every)
    assert len(caught) == 1
    assert issubclass(caught[0].category, UserWarning)
    assert "gal_occ" in str(caught[0].message)
    assert caught[0].filename == __file__  # where the caller is
