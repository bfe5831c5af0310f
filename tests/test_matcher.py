"""Scores and gradients of QAConv, in every form of call, are those of an eager fp64 model."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from eager import (
    MODES,
    Eager,
    assert_as_eager,
    class_inputs,
    gallery_inputs,
    gradients,
    leaves,
    with_own_class,
)
from inputs import (
    DEVICE,
    LABELS,
    C,
    H,
    K,
    N,
    S,
    W,
    gradient_of,
    ids,
    make_class_matcher,
    make_matcher,
    maps,
    visibility,
)
from pairwise import pairwise
from tolerances import assert_all_close, assert_close, assert_rounded, assert_rounded_gradients
from torch import Tensor

from qaconv_triton import QAConv
from qaconv_triton import scores as scores_module
from qaconv_triton.cpu import max_correlation as cpu

EITHER = [False, True]
CALLS = ["classes", "every class", "gallery", "same"]


def inputs_of(call: str, dtype: torch.dtype, occluded: bool) -> dict[str, Any]:
    """Arguments for a form of call."""
    if call == "gallery":
        return gallery_inputs(dtype, occluded)
    if call == "same":
        inputs: dict[str, Any] = {"prob_fea": maps(4, 1, dtype), "gal_fea": "same"}
        if occluded:  # the same maps need not be the same visibility
            inputs |= {"prob_occ": visibility(4, 2, dtype), "gal_occ": visibility(4, 4, dtype)}
        return inputs
    inputs = class_inputs(dtype, occluded)
    return inputs if call == "classes" else inputs | {"labels": None}


# --- scores, statistics and gradients


@pytest.mark.parametrize(
    ("call", "mode", "occluded"),
    [("classes", "train", True), ("every class", "eval", False), ("gallery", "train", True), ("same", "eval", False)],
)
def test_scores_statistics_and_gradients(backend: str, call: str, mode: str, occluded: bool) -> None:
    matcher = make_class_matcher(mode=mode, include_self=occluded)
    assert_as_eager(matcher, inputs_of(call, torch.float32, occluded))


@pytest.mark.parametrize(
    ("call", "mode", "occluded", "include_self", "block"), pairwise(CALLS, MODES, EITHER, EITHER, [1, 100, 400])
)
def test_tiling_changes_nothing(
    call: str, mode: str, occluded: bool, include_self: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The eager model sees all pairs at once; so do the batch norms of every tiling, and the gradients."""
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "torch")
    monkeypatch.setattr(cpu, "MAX_CORRELATIONS", block)
    monkeypatch.setattr(cpu, "MAX_TERMS", block % 90)
    monkeypatch.setattr(scores_module, "MAP_BYTES", 4 * C * S * (block % 3))
    build = partial(make_class_matcher, torch.float64, mode, include_self=include_self)
    inputs = inputs_of(call, torch.float64, occluded)
    assert_as_eager(build(), inputs)
    with torch.no_grad():  # where pooled values may be dropped, tiles of pairs are scored one by one
        assert_close(build()(**inputs), Eager(build())(**inputs), torch.float64)


def test_one_visibility_for_both_sides_has_the_gradient_of_both() -> None:
    """The losses pass one tensor twice."""
    matcher = make_matcher(torch.float64)
    results = []
    for module in (matcher, Eager(matcher)):
        feature, visible = maps(4, 1, torch.float64).requires_grad_(), visibility(4, 2, torch.float64).requires_grad_()
        scores = module(feature, "same", prob_occ=visible, gal_occ=visible)
        results.append({"scores": scores, **gradients(scores, {"feature": feature, "visible": visible}, module)})
    assert_all_close(*results, torch.float64)


@pytest.mark.parametrize("left_out", ["prob_occ", "gal_occ"])
def test_one_side_alone_may_be_occluded(left_out: str) -> None:
    inputs = gallery_inputs(torch.float64, occluded=True)
    del inputs[left_out]
    assert_as_eager(make_matcher(torch.float64), inputs)


@pytest.mark.parametrize("call", ["gallery", "classes"])
def test_visibility_may_lack_the_channel_axis(call: str) -> None:
    matcher = make_class_matcher(mode="eval")
    inputs = inputs_of(call, torch.float32, occluded=True)
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


def test_visibility_acts_on_its_own_axis() -> None:
    """With a head that reads one location s only, hiding it leaves a constant: on the probe, not on the gallery."""
    matcher = make_matcher(mode="eval")
    hidden, probe, gallery = 4, maps(4, 1), maps(3, 3)
    visible = torch.ones(4, 1, H, W, device=DEVICE)
    visible.view(4, S)[:, hidden] = 0.0
    for half, name, other in ((0, "prob_occ", "gal_occ"), (1, "gal_occ", "prob_occ")):
        with torch.no_grad():
            matcher.fc.weight.zero_()
            matcher.fc.weight[0, half * S + hidden] = 1.0
            value = torch.zeros(2, 1, device=DEVICE)  # of a correlation of zero
            value = matcher.logit_bn(matcher.bn(value) + matcher.fc.bias)[0]
        counts = {"prob_occ": len(probe), "gal_occ": len(gallery)}
        scores = matcher(probe, gallery, **{name: visible[: counts[name]]})
        assert_close(scores, value.expand_as(scores), torch.float32)
        swapped = matcher(probe, gallery, **{other: visible[: counts[other]]})
        assert float(swapped.detach().std()) > 1e-2


def test_class_path_ignores_gallery_visibility_with_one_warning() -> None:
    matcher = make_class_matcher(mode="eval")
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


# --- forms of call


def test_labels_are_ignored_beside_a_gallery() -> None:
    matcher = make_class_matcher(mode="eval")
    inputs = gallery_inputs(torch.float32, occluded=False)
    assert torch.equal(matcher(**inputs, labels=ids([0, 1, 2, 3])), matcher(**inputs))
    assert matcher.class_neighbors is None


def test_arguments_go_by_position() -> None:
    """Scripts written for QAConv pass them in this order."""
    matcher = make_class_matcher(mode="eval")
    inputs = gallery_inputs(torch.float32, occluded=True)
    by_position = matcher(inputs["prob_fea"], inputs["gal_fea"], None, inputs["prob_occ"], inputs["gal_occ"])
    assert torch.equal(by_position, matcher(**inputs))
    assert QAConv(C, H, W, N, K).k_nearest == K
    classes = class_inputs(torch.float32, occluded=True)
    by_position = matcher(classes["prob_fea"], None, classes["labels"], classes["prob_occ"], None)
    assert torch.equal(by_position, matcher(**classes))


def test_match_is_eval_mode_without_gradients(backend: str) -> None:
    matcher = make_matcher()
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
    assert_close(actual, eager(**leaves(inputs, torch.float64)), torch.float32)
    matcher.bn.eval()
    matcher.match(inputs["prob_fea"], inputs["gal_fea"])
    assert (matcher.training, matcher.bn.training, matcher.logit_bn.training) == (True, False, True)


@pytest.mark.parametrize("map_bytes", [1, 4 * C * S * 2, 4 * C * S * 100])
def test_match_in_tiles(monkeypatch: pytest.MonkeyPatch, map_bytes: int) -> None:
    matcher = make_matcher(torch.float64)
    arguments = tuple(gallery_inputs(torch.float64, occluded=True).values())
    expected = Eager(matcher).eval()(arguments[0], arguments[1], None, *arguments[2:])
    monkeypatch.setattr(scores_module, "MAP_BYTES", map_bytes)
    assert_close(matcher.match(*arguments), expected, torch.float64)


@pytest.mark.parametrize("count", [1, 4, 300])
def test_match_pairs_is_the_diagonal_of_match(count: int) -> None:
    matcher = make_matcher(torch.float64)
    features = maps(count, 1, torch.float64), maps(count, 3, torch.float64)
    visible = visibility(count, 2, torch.float64), visibility(count, 4, torch.float64)
    diagonal = matcher.match_pairs(*features, *visible)
    assert diagonal.shape == (count,)
    assert not diagonal.requires_grad
    assert matcher.training
    assert_close(diagonal, matcher.match(*features, *visible).diagonal(), torch.float64)
    assert_close(matcher.match_pairs(*features), matcher.match(*features).diagonal(), torch.float64)


def test_match_pairs_on_the_kernels(backend: str) -> None:
    matcher = make_matcher()
    features, visible = (maps(4, 1), maps(4, 3)), (visibility(4, 2), visibility(4, 4))
    diagonal = matcher.match(*features, *visible).diagonal()
    assert_close(matcher.match_pairs(*features, *visible), diagonal, torch.float32)


def test_make_kernel_serves_once() -> None:
    matcher = make_class_matcher(torch.float64)
    inputs = gallery_inputs(torch.float64, occluded=True)

    def with_kernel(ready: dict[str, Any]) -> Tensor:
        matcher.make_kernel(ready["gal_fea"])
        scores: Tensor = matcher(ready["prob_fea"], prob_occ=ready["prob_occ"], gal_occ=ready["gal_occ"])
        return scores

    assert_as_eager(matcher, inputs, with_kernel)
    assert matcher(inputs["prob_fea"]).shape == (4, N)  # the classes again


def test_make_kernel_waits_where_a_gallery_is_given() -> None:
    matcher = make_matcher(mode="eval")
    matcher.make_kernel(maps(2, 5))
    assert matcher(maps(4, 1), maps(3, 3)).shape == (4, 3)
    assert matcher(maps(4, 1)).shape == (4, 2)
    with pytest.raises(ValueError, match="num_classes"):
        matcher(maps(4, 1))


@with_own_class
def test_class_scores_are_the_scored_columns(include_self: bool) -> None:
    matcher = make_class_matcher(include_self=include_self)
    inputs = class_inputs(torch.float32, occluded=True)
    dense = matcher.clone()(**inputs)
    compact = matcher.class_scores(inputs["prob_fea"], inputs["labels"], inputs["prob_occ"])
    width = K + include_self
    assert compact.values.shape == compact.classes.shape == (len(LABELS), width)
    assert compact.num_classes == N
    assert torch.equal(compact.classes, Eager(matcher).scored_classes(inputs["labels"]))
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


def test_class_scores_have_the_same_gradients_in_every_form() -> None:
    weight = maps(len(LABELS), 3, torch.float64, (N,))
    found = []
    for form in ("values", "dense", "sparse"):
        matcher = make_class_matcher(torch.float64)
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
        leaf = {"features": inputs["prob_fea"], "visibility": inputs["prob_occ"], "table": matcher.class_embed}
        found.append({name: gradient_of(tensor) for name, tensor in leaf.items()})
    assert all(gradient.abs().max() > 1e-4 for gradient in found[0].values())
    for others in found[1:]:
        assert_all_close(others, found[0], torch.float64)


# --- half precision


@pytest.mark.parametrize(
    ("dtype", "module_dtype", "call"),
    pairwise([torch.float16, torch.bfloat16], ["same", "float32"], ["classes", "gallery"]),
)
def test_half_precision(backend: str, dtype: torch.dtype, module_dtype: str, call: str) -> None:
    matcher = make_class_matcher(mode="eval")
    if module_dtype == "same":
        matcher.to(dtype)
    inputs = inputs_of(call, dtype, occluded=True)
    eager = Eager(matcher)
    expected_inputs, actual_inputs = leaves(inputs, torch.float64), leaves(inputs, dtype)
    expected, actual = eager(**expected_inputs), matcher(**actual_inputs)
    assert actual.dtype == torch.float32
    assert_rounded(actual, expected, dtype)
    found = gradients(actual, actual_inputs, matcher)
    assert_rounded_gradients(found, gradients(expected, expected_inputs, eager), dtype)
    for name, gradient in found.items():
        if gradient is not None:
            assert gradient.dtype == (dtype if name in actual_inputs else matcher.fc.weight.dtype), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_trains(backend: str, dtype: torch.dtype) -> None:
    matcher = make_class_matcher().to(dtype)
    eager = Eager(matcher)
    inputs = class_inputs(dtype, occluded=False)
    actual, expected = matcher(**inputs), eager(**leaves(inputs, torch.float64))
    scored = expected != 0
    assert_rounded(actual[scored], expected[scored], dtype)
    assert matcher.bn.running_mean is not None
    assert matcher.bn.running_mean.dtype == dtype
    for name, buffer in eager.named_buffers():
        assert_close(matcher.get_buffer(name), buffer, dtype, name)
