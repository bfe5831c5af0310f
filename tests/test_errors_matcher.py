"""What QAConv refuses: the exact error, with what came in restated, and a matcher that is as it was before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from errors import META, B, class_matcher, features, labels, refused
from inputs import CPU, C, H, K, N, W, make_matcher
from torch import Tensor

from qaconv_triton import QAConv, SoftmaxTripletLoss, validation
from qaconv_triton import functional as qf
from qaconv_triton.kernels import config

Call = Callable[[QAConv], Any]
Case = tuple[Call, type[Exception], tuple[str, ...]]

# --- construction


@pytest.mark.parametrize(
    ("arguments", "options", "error", "restated"),
    [
        ((C, H, W), {"num_classes": N, "k_nearest": 0}, ValueError, ("k_nearest", "got 0")),
        ((C, H, W), {"num_classes": N, "k_nearest": -4}, ValueError, ("k_nearest", "got -4")),
        ((C, H, W), {"num_classes": N, "k_nearest": N}, ValueError, ("k_nearest", "got 8", "num_classes is 8", "7")),
        ((C, H, W), {"num_classes": 20}, ValueError, ("k_nearest", "got 20", "num_classes is 20", "19")),
        ((C, H, W), {"k_nearest": 0}, ValueError, ("k_nearest", "got 0")),
        ((C, H, W), {"num_classes": 1, "k_nearest": 1}, ValueError, ("num_classes", "got 1")),
        ((C, H, W), {"num_classes": 0, "k_nearest": 1}, ValueError, ("num_classes", "got 0")),
        ((0, H, W), {}, ValueError, ("num_features", "got 0")),
        ((C, -1, W), {}, ValueError, ("height", "got -1")),
        ((C, H, 0), {}, ValueError, ("width", "got 0")),
        ((5.0, H, W), {}, TypeError, ("num_features", "float")),
        ((C, H, "3"), {}, TypeError, ("width", "str")),
        ((C, H, W), {"num_classes": N, "k_nearest": 2.5}, TypeError, ("k_nearest", "float")),
        ((C, H, W), {"num_classes": N, "k_nearest": True}, TypeError, ("k_nearest", "bool")),
        ((C, H, W), {"num_classes": "8", "k_nearest": 2}, TypeError, ("num_classes", "str")),
        ((C, H, np.bool_(True)), {}, TypeError, ("width", "bool")),
        ((C, H, torch.tensor(True)), {}, TypeError, ("width", "Tensor")),
        ((C, H, torch.ones(2, dtype=torch.int64)), {}, TypeError, ("width", "Tensor")),
        ((np.int64(0), H, W), {}, ValueError, ("num_features", "got 0")),
        ((C, H, W), {"include_self": 1}, TypeError, ("include_self", "1")),
        ((C, H, W), {"sparse_grad": 0.0}, TypeError, ("sparse_grad", "0.0")),
        ((C, H, W), {"shared_fc": "yes"}, TypeError, ("shared_fc", "'yes'")),
    ],
)
def test_construction(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], restated: tuple[str, ...]
) -> None:
    with refused(error, restated):
        QAConv(*arguments, **options)


def test_the_largest_k_is_allowed() -> None:
    assert QAConv(C, H, W, num_classes=N, k_nearest=N - 1).compute_class_neighbors().shape == (N, N - 1)
    assert QAConv(C, H, W, num_classes=2, k_nearest=1).compute_class_neighbors().tolist() == [[1], [0]]


def test_sizes_of_any_integer_type() -> None:
    class Three:
        def __index__(self) -> int:
            return 3

    sizes = np.int64(C), np.uint8(H), Three(), torch.tensor(N)
    matcher = QAConv(*sizes, k_nearest=np.int32(K))  # type: ignore[arg-type]
    assert all(type(size) is int for size in (matcher.num_features, matcher.height, matcher.width, matcher.k_nearest))
    assert matcher(features(), labels=labels()).shape == (B, N)
    assert str(matcher) == str(QAConv(C, H, W, N, K))


# --- features: every kind at three calls, and at every call those kinds that are most easily taken for others

SHAPES: dict[str, tuple[int, ...]] = {
    "3-D": (C, H, W),
    "flat": (B, C * H * W),
    "5-D": (B, C, H, W, 1),
    "H and W swapped": (B, C, W, H),
    "C and H swapped": (B, H, C, W),
    "one row of locations": (B, C, 1, H * W),
    "channels last": (B, H, W, C),
    "more channels": (B, C + 1, H, W),
    "broadcastable": (B, 1, H, W),
}
FEATURES: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    **{kind: (features(*shape), ValueError, (f"[B, {C}, {H}, {W}]", f"{[*shape]}")) for kind, shape in SHAPES.items()},
    **{
        str(dtype): (torch.ones(B, C, H, W, dtype=dtype), TypeError, (str(dtype), "float32"))
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64)
    },
    "another device": (features().to(META), ValueError, ("meta", "cpu")),
    "sparse": (features().to_sparse(), TypeError, ("dense", "sparse_coo")),
    "nested": (torch.nested.nested_tensor([features()[0]], layout=torch.jagged), TypeError, ("dense", "nested")),
    "a list": ([1.0], TypeError, ("list",)),
}
CALLS: dict[str, Callable[[QAConv, Any], Any]] = {
    "forward, labels": lambda matcher, bad: matcher(bad, labels=labels()),
    "forward, all classes": lambda matcher, bad: matcher(bad),
    "forward, probe": lambda matcher, bad: matcher(bad, features()),
    "forward, same": lambda matcher, bad: matcher(bad, "same"),
    "forward, gallery": lambda matcher, bad: matcher(features(), bad),
    "class_scores": lambda matcher, bad: matcher.class_scores(bad, labels()),
    "match, probe": lambda matcher, bad: matcher.match(bad, features()),
    "match, gallery": lambda matcher, bad: matcher.match(features(), bad),
    "match_pairs, probe": lambda matcher, bad: matcher.match_pairs(bad, features()),
    "match_pairs, gallery": lambda matcher, bad: matcher.match_pairs(features(), bad),
    "make_kernel": lambda matcher, bad: matcher.make_kernel(bad),
}
WITH_EVERY_KIND = ("forward, labels", "forward, gallery", "match, probe")
AT_EVERY_CALL = ("H and W swapped", "broadcastable", "torch.int64", "another device", "sparse")

CASES: dict[str, Case] = {}
for _name, _call in CALLS.items():
    for _kind in FEATURES if _name in WITH_EVERY_KIND else AT_EVERY_CALL:
        _bad, _error, _restated = FEATURES[_kind]
        CASES[f"{_name}: {_kind}"] = (lambda matcher, call=_call, bad=_bad: call(matcher, bad), _error, _restated)

# --- visibility maps

VISIBILITY: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    **{
        f"{[*shape]}": (torch.ones(shape), ValueError, ("occ", f"[{B}, 1, {H}, {W}]", f"{[*shape]}"))
        for shape in ((B, 1, W, H), (B - 1, 1, H, W), (B, C, H, W), (1, 1, H, W), (H, W), (B, H * W), (B, 1, 1, H * W))
    },
    "bool": (torch.ones(B, 1, H, W, dtype=torch.bool), TypeError, ("occ", "torch.bool")),
    "sparse": (torch.ones(B, 1, H, W).to_sparse(), TypeError, ("occ", "dense", "sparse_coo")),
    "another device": (torch.ones(B, 1, H, W, device=META), ValueError, ("occ", "meta", "cpu")),
    "a number": (1.0, TypeError, ("occ", "float")),
}
OCCLUDED: dict[str, Callable[[QAConv, Any], Any]] = {
    "labels": lambda matcher, bad: matcher(features(), labels=labels(), prob_occ=bad),
    "class_scores": lambda matcher, bad: matcher.class_scores(features(), labels(), bad),
    "all classes": lambda matcher, bad: matcher(features(), prob_occ=bad),
    "probe": lambda matcher, bad: matcher(features(), features(), prob_occ=bad),
    "gallery": lambda matcher, bad: matcher(features(), features(), gal_occ=bad),
    "same": lambda matcher, bad: matcher(features(), "same", gal_occ=bad),
    "match": lambda matcher, bad: matcher.match(features(), features(), bad),
    "match's gallery": lambda matcher, bad: matcher.match(features(), features(), None, bad),
    "match_pairs": lambda matcher, bad: matcher.match_pairs(features(), features(), bad),
    "match_pairs's gallery": lambda matcher, bad: matcher.match_pairs(features(), features(), None, bad),
}
for _name, _call in OCCLUDED.items():
    for _kind in VISIBILITY if _name in ("labels", "gallery") else (f"{[B, 1, W, H]}", f"{[1, 1, H, W]}", "bool"):
        _bad, _error, _restated = VISIBILITY[_kind]
        CASES[f"visibility of {_name}: {_kind}"] = (
            lambda matcher, call=_call, bad=_bad: call(matcher, bad),
            _error,
            _restated,
        )

# --- labels, and the rest

LABELS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "too large": (labels(3, 8, 0, 1), IndexError, ("labels", "[0, 8)", "[8]")),
    "negative": (labels(-1, 3, 3, 3), IndexError, ("labels", "[0, 8)", "[-1]")),
    "all wrong": (labels(-8, 99, 2**40, 3), IndexError, ("labels", "[0, 8)", "[-8, 99, 1099511627776]")),
    "int8": (torch.tensor([3, 0, -1, 7], dtype=torch.int8), IndexError, ("labels", "[-1]")),
    "float": (labels().float(), TypeError, ("labels", "torch.float32")),
    "bool": (torch.ones(B, dtype=torch.bool), TypeError, ("labels", "torch.bool")),
    "complex": (torch.ones(B, dtype=torch.complex64), TypeError, ("labels", "torch.complex64")),
    "a list": ([3, 0, 3, 7], TypeError, ("labels", "list")),
    "short": (labels(3, 0, 3), ValueError, ("labels", "[4]", "[3]")),
    "long": (labels(3, 0, 3, 7, 1), ValueError, ("labels", "[4]", "[5]")),
    "one for all": (labels(3), ValueError, ("labels", "[4]", "[1]")),
    "2-D": (labels()[:, None], ValueError, ("labels", "[4]", "[4, 1]")),
    "0-D": (torch.tensor(3), ValueError, ("labels", "[4]", "[]")),
    "another device": (labels().to(META), ValueError, ("labels", "meta", "cpu")),
    "sparse": (labels().to_sparse(), TypeError, ("labels", "dense", "sparse_coo")),
}
for _kind, (_bad, _error, _restated) in LABELS.items():
    CASES[f"labels: {_kind}"] = (lambda matcher, bad=_bad: matcher(features(), labels=bad), _error, _restated)
for _kind in ("negative", "float", "short"):
    _bad, _error, _restated = LABELS[_kind]
    CASES[f"class_scores, labels: {_kind}"] = (
        lambda matcher, bad=_bad: matcher.class_scores(features(), bad),
        _error,
        _restated,
    )

CASES |= {
    "gal_fea: another string": (
        lambda matcher: matcher(features(), "Same"),
        ValueError,
        ("gal_fea", "'Same'", '"same"'),
    ),
    "gal_fea: a list": (lambda matcher: matcher(features(), [features()]), TypeError, ("gal_fea", "list")),
    "pairs: fewer": (
        lambda matcher: matcher.match_pairs(features(), features(3, C, H, W)),
        ValueError,
        ("[4, 5, 2, 3]", "[3, 5, 2, 3]"),
    ),
    "pairs: one for all": (
        lambda matcher: matcher.match_pairs(features(), features(1, C, H, W)),
        ValueError,
        ("[4, 5, 2, 3]", "[1, 5, 2, 3]"),
    ),
    "a single pair, gallery": (
        lambda matcher: matcher(features(1, C, H, W), features(1, C, H, W)),
        ValueError,
        ("more than one", "got 1", "eval()"),
    ),
    "a single pair, same": (
        lambda matcher: matcher(features(1, C, H, W), "same"),
        ValueError,
        ("more than one", "got 1", "eval()"),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input_is_refused_and_changes_nothing(case: Case) -> None:
    call, error, restated = case
    matcher = class_matcher()
    with refused(error, restated, matcher):
        call(matcher)
    matcher(features(seed=7), labels=labels()).square().sum().backward()  # now with a graph, gradients and statistics
    matcher.bn.eval()
    with refused(error, restated, matcher):
        call(matcher)


@pytest.mark.parametrize(
    ("call", "error", "restated"),
    [
        (lambda matcher: matcher(features(B, C, W, H)), ValueError, ("[4, 5, 3, 2]",)),
        (lambda matcher: matcher(features().long()), TypeError, ("torch.int64",)),
        (lambda matcher: matcher(features(), gal_occ=torch.ones(3, 1, H, W)), ValueError, ("gal_occ", "[3, 1, 2, 3]")),
        (lambda matcher: matcher(features(1, C, H, W)), ValueError, ("got 1",)),
        (lambda matcher: matcher(features(B, C, W, H), features()), ValueError, ("[4, 5, 3, 2]",)),
        (lambda matcher: matcher.make_kernel(features(B, C, W, H)), ValueError, ("[4, 5, 3, 2]",)),
    ],
    ids=["probe", "dtype", "visibility of the kernel", "single pair", "beside a gallery", "another kernel"],
)
def test_a_kernel_stays_until_it_is_used(call: Call, error: type[Exception], restated: tuple[str, ...]) -> None:
    matcher = class_matcher()
    matcher.make_kernel(features(1, C, H, W))
    with refused(error, restated, matcher):
        call(matcher)
    assert matcher(features()).shape == (B, 1)


@pytest.mark.parametrize("built", [False, True], ids=["lazy graph", "graph built"])
def test_a_single_pair_of_classes_has_no_batch_statistics(built: bool) -> None:
    """One sample and one neighbour."""
    matcher = class_matcher(k_nearest=1)
    if built:
        matcher.compute_class_neighbors()
    for call in (
        lambda: matcher(features(1, C, H, W), labels=labels(3)),
        lambda: matcher.class_scores(features(1, C, H, W), labels(3)),
    ):
        with refused(ValueError, ("more than one", "got 1"), matcher):
            call()
    matcher.logit_bn.eval()
    assert matcher(features(1, C, H, W), labels=labels(3)).count_nonzero() == 1


# --- the class table and its graph


@pytest.mark.parametrize(
    "call",
    [
        lambda matcher: matcher(features()),
        lambda matcher: matcher(features(), labels=labels()),
        lambda matcher: matcher(features(), gal_occ=torch.ones(B, 1, H, W)),
        lambda matcher: matcher.class_scores(features(), labels()),
        lambda matcher: matcher.compute_class_neighbors(),
        lambda matcher: SoftmaxTripletLoss(matcher)(features(), labels()),
    ],
    ids=["all classes", "labels", "gal_occ", "class_scores", "compute_class_neighbors", "SoftmaxTripletLoss"],
)
def test_a_matcher_without_a_class_table(call: Call) -> None:
    matcher = make_matcher(device=CPU)
    with refused(ValueError, ("num_classes",), matcher):
        call(matcher)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.nan, torch.float32),
        (torch.inf, torch.bfloat16),
        (-torch.inf, torch.float16),
        (torch.nan, torch.float64),
    ],
)
def test_a_class_table_that_is_not_finite(value: float, dtype: torch.dtype) -> None:
    matcher = class_matcher(dtype=dtype)
    assert matcher.class_embed is not None
    with torch.no_grad():
        matcher.class_embed[6, 1, 1, 2] = value
        matcher.class_embed[2, 4, 0, 0] = value
    feature = features().to(dtype)
    for call in (
        matcher.compute_class_neighbors,
        lambda: matcher(feature, labels=labels()),
        lambda: matcher.class_scores(feature, labels()),
    ):
        with refused(ValueError, ("2 of 8 classes", "[2, 6]"), matcher):
            call()
    with torch.no_grad():
        matcher.class_embed.fill_(value)
    with refused(ValueError, ("8 of 8 classes", "[0, 1, 2, 3, 4]"), matcher):
        matcher.compute_class_neighbors()


def test_an_old_graph_survives_a_table_that_is_not_finite() -> None:
    matcher = class_matcher()
    matcher.compute_class_neighbors()
    assert matcher.class_embed is not None
    with torch.no_grad():
        matcher.class_embed[6] = torch.nan
    with refused(ValueError, ("1 of 8 classes", "[6]"), matcher):
        matcher.compute_class_neighbors()


@pytest.mark.parametrize("k", [0, N])
def test_k_set_out_of_range_later(k: int) -> None:
    matcher = class_matcher()
    matcher.compute_class_neighbors()
    matcher.k_nearest = k
    for call in (matcher.compute_class_neighbors, lambda: matcher(features(), labels=labels())):
        with refused(ValueError, (f"got {k}", "7"), matcher):
            call()


# --- environment variables


def every_call(matcher: QAConv) -> list[Callable[[], Tensor]]:
    return [
        lambda: matcher(features(), labels=labels()),
        lambda: matcher(features()),
        lambda: matcher(features(), "same"),
        lambda: matcher.match(features(), features()),
    ]


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "cuda")
    matcher = class_matcher()
    for call in every_call(matcher):
        with refused(ValueError, ("QACONV_TRITON_BACKEND", "'cuda'"), matcher):
            call()


def test_compiled_kernels_refuse_tensors_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "triton")
    monkeypatch.setattr(config, "INTERPRETED", False)
    matcher = class_matcher()
    for call in every_call(matcher):
        with refused(RuntimeError, ("QACONV_TRITON_BACKEND=triton", "TRITON_INTERPRET=1", "got cpu"), matcher):
            call()
    assert matcher.double()(features().double(), "same").shape == (B, B)  # fp64 is never for the kernels


@pytest.mark.parametrize("value", ["yes", "2", " 1"])
def test_unknown_value_of_the_checks_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(validation.CHECKS_VARIABLE, value)
    matcher = class_matcher()
    with refused(ValueError, ("QACONV_TRITON_CHECKS", repr(value)), matcher):
        matcher(features(), labels=labels())
    with refused(ValueError, ("QACONV_TRITON_CHECKS", repr(value))):
        qf.max_correlation(features(), features(), torch.zeros(B, 1, dtype=torch.int64))
