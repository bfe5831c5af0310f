"""Bad input: the exact error, with what came in restated, and a module that is as it was before."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from qaconv_triton import (
    ClassMemoryLoss,
    ClassScores,
    PairwiseMatchingLoss,
    QAConv,
    SoftmaxTripletLoss,
    TripletLoss,
    ops,
    validation,
)
from qaconv_triton import functional as qf
from qaconv_triton import matcher as matcher_module
from qaconv_triton import scores as scores_module
from qaconv_triton.kernels import config

C, H, W, N, K = 5, 2, 3, 8, 3
LABELS = [3, 0, 3, 7]
B = len(LABELS)
META = torch.device("meta")


def build(**options: Any) -> QAConv:
    torch.manual_seed(0)
    matcher = QAConv(C, H, W, **{"num_classes": N, "k_nearest": K, **options})
    with torch.no_grad():
        for parameter in (*matcher.bn.parameters(), *matcher.fc.parameters(), *matcher.logit_bn.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return matcher


def maps(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape or (B, C, H, W), generator=torch.Generator().manual_seed(seed))


def labels(*values: int) -> Tensor:
    return torch.tensor(values or LABELS)


def state_of(matcher: QAConv) -> dict[str, Any]:
    """Everything that an error must not change."""
    state: dict[str, Any] = {name: value.clone() for name, value in matcher.state_dict().items()}
    state |= {f"id of {name}": id(parameter) for name, parameter in matcher.named_parameters()}
    state |= {f"grad of {name}": parameter.grad for name, parameter in matcher.named_parameters()}
    state |= {f"mode of {name}": module.training for name, module in matcher.named_modules()}
    graph = matcher.class_neighbors
    state |= {"graph": graph, "graph's values": None if graph is None else graph.clone()}
    state |= {"hint": matcher._last_graph}
    state |= {"kernel": matcher._pending_gallery, "warned": matcher._warned_of_gallery_visibility}
    state |= {"k_nearest": matcher.k_nearest, "rng": torch.get_rng_state()}
    return state


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, Tensor):
            assert isinstance(after[name], Tensor), name
            assert torch.equal(value.nan_to_num(), after[name].nan_to_num()), name
        else:
            assert value is after[name] or value == after[name], name
    for name in ("graph", "hint", "kernel"):
        assert before[name] is after[name], name


@contextmanager
def refused(error: type[BaseException], restated: tuple[str, ...], matcher: QAConv | None = None) -> Iterator[None]:
    """Expect exactly `error`, whose message contains `restated`, and nothing changed."""
    rng = torch.get_rng_state()
    before = None if matcher is None else state_of(matcher)
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error
    message = str(caught.value)
    for part in restated:
        assert part in message, f"{part!r} is not in {message!r}"
    assert torch.equal(torch.get_rng_state(), rng)
    if matcher is not None and before is not None:
        assert_unchanged(before, state_of(matcher))


# --- construction -----------------------------------------------------------------------------------------------------


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
    assert matcher(maps(), labels=labels()).shape == (B, N)
    assert str(matcher) == str(QAConv(C, H, W, N, K))
    assert qf.class_neighbors(torch.eye(4), np.int64(2), workspace_bytes=np.int64(10**6)).shape == (4, 2)  # type: ignore[call-overload]
    assert qf.topk_cosine(torch.eye(4), torch.eye(4), Three())[1].shape == (4, 3)  # type: ignore[arg-type]


# --- the matcher ------------------------------------------------------------------------------------------------------

Call = Callable[[QAConv], Any]

BAD_SHAPES: dict[str, tuple[int, ...]] = {
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
ENTRANCES: dict[str, Callable[[QAConv, Tensor], Any]] = {
    "forward, labels": lambda matcher, bad: matcher(bad, labels=labels()),
    "forward, all classes": lambda matcher, bad: matcher(bad),
    "forward, probe": lambda matcher, bad: matcher(bad, maps()),
    "forward, same": lambda matcher, bad: matcher(bad, "same"),
    "forward, gallery": lambda matcher, bad: matcher(maps(), bad),
    "class_scores": lambda matcher, bad: matcher.class_scores(bad, labels()),
    "match, probe": lambda matcher, bad: matcher.match(bad, maps()),
    "match, gallery": lambda matcher, bad: matcher.match(maps(), bad),
    "match_pairs, probe": lambda matcher, bad: matcher.match_pairs(bad, maps()),
    "match_pairs, gallery": lambda matcher, bad: matcher.match_pairs(maps(), bad),
    "make_kernel": lambda matcher, bad: matcher.make_kernel(bad),
}

CASES: dict[str, tuple[Call, type[Exception], tuple[str, ...]]] = {}
for _entrance, _call in ENTRANCES.items():
    for _kind, _shape in BAD_SHAPES.items():
        CASES[f"{_entrance}: {_kind}"] = (
            lambda matcher, call=_call, shape=_shape: call(matcher, maps(*shape)),
            ValueError,
            (f"[B, {C}, {H}, {W}]", str(list(_shape))),
        )
    for _dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        CASES[f"{_entrance}: {_dtype}"] = (
            lambda matcher, call=_call, dtype=_dtype: call(matcher, torch.ones(B, C, H, W, dtype=dtype)),
            TypeError,
            (str(_dtype), "float32"),
        )
    CASES[f"{_entrance}: another device"] = (
        lambda matcher, call=_call: call(matcher, maps().to(META)),
        ValueError,
        ("meta", "cpu"),
    )
    CASES[f"{_entrance}: sparse"] = (
        lambda matcher, call=_call: call(matcher, maps().to_sparse()),
        TypeError,
        ("dense", "sparse_coo"),
    )
    CASES[f"{_entrance}: nested"] = (
        lambda matcher, call=_call: call(matcher, torch.nested.nested_tensor([maps()[0]], layout=torch.jagged)),
        TypeError,
        ("dense", "nested"),
    )
    if "gallery" not in _entrance:
        CASES[f"{_entrance}: a list"] = (
            lambda matcher, call=_call: call(matcher, [1.0]),
            TypeError,
            ("list",),
        )


def occluded(matcher: QAConv, name: str, veil: Any) -> Any:
    """Reach every visibility argument by name."""
    calls: dict[str, Callable[[], Any]] = {
        "labels": lambda: matcher(maps(), labels=labels(), prob_occ=veil),
        "class_scores": lambda: matcher.class_scores(maps(), labels(), veil),
        "all classes": lambda: matcher(maps(), prob_occ=veil),
        "probe": lambda: matcher(maps(), maps(), prob_occ=veil),
        "gallery": lambda: matcher(maps(), maps(), gal_occ=veil),
        "same": lambda: matcher(maps(), "same", gal_occ=veil),
        "match": lambda: matcher.match(maps(), maps(), veil),
        "match's gallery": lambda: matcher.match(maps(), maps(), None, veil),
        "match_pairs": lambda: matcher.match_pairs(maps(), maps(), veil),
        "match_pairs's gallery": lambda: matcher.match_pairs(maps(), maps(), None, veil),
    }
    return calls[name]()


for _name in (
    "labels", "class_scores", "all classes", "probe", "gallery", "same",
    "match", "match's gallery", "match_pairs", "match_pairs's gallery",
):  # fmt: skip
    for _shape in ((B, 1, W, H), (B - 1, 1, H, W), (B, C, H, W), (1, 1, H, W), (H, W), (B, H * W), (B, 1, 1, H * W)):
        CASES[f"visibility of {_name}: {list(_shape)}"] = (
            lambda matcher, name=_name, shape=_shape: occluded(matcher, name, torch.ones(shape)),
            ValueError,
            ("occ", f"[{B}, 1, {H}, {W}]", str(list(_shape))),
        )
    CASES[f"visibility of {_name}: bool"] = (
        lambda matcher, name=_name: occluded(matcher, name, torch.ones(B, 1, H, W, dtype=torch.bool)),
        TypeError,
        ("occ", "torch.bool"),
    )
    CASES[f"visibility of {_name}: sparse"] = (
        lambda matcher, name=_name: occluded(matcher, name, torch.ones(B, 1, H, W).to_sparse()),
        TypeError,
        ("occ", "dense", "sparse_coo"),
    )
    CASES[f"visibility of {_name}: another device"] = (
        lambda matcher, name=_name: occluded(matcher, name, torch.ones(B, 1, H, W, device=META)),
        ValueError,
        ("occ", "meta", "cpu"),
    )
    CASES[f"visibility of {_name}: a number"] = (
        lambda matcher, name=_name: occluded(matcher, name, 1.0),
        TypeError,
        ("occ", "float"),
    )

LABEL_CASES: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
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
for _kind, (_labels, _error, _restated) in LABEL_CASES.items():
    CASES[f"labels: {_kind}"] = (
        lambda matcher, bad=_labels: matcher(maps(), labels=bad),
        _error,
        _restated,
    )
    CASES[f"class_scores, labels: {_kind}"] = (
        lambda matcher, bad=_labels: matcher.class_scores(maps(), bad),
        _error,
        _restated,
    )

CASES |= {
    "gal_fea: another string": (lambda matcher: matcher(maps(), "Same"), ValueError, ("gal_fea", "'Same'", '"same"')),
    "gal_fea: a list": (lambda matcher: matcher(maps(), [maps()]), TypeError, ("gal_fea", "list")),
    "pairs: fewer": (
        lambda matcher: matcher.match_pairs(maps(), maps(3, C, H, W)),
        ValueError,
        ("[4, 5, 2, 3]", "[3, 5, 2, 3]"),
    ),
    "pairs: one for all": (
        lambda matcher: matcher.match_pairs(maps(), maps(1, C, H, W)),
        ValueError,
        ("[4, 5, 2, 3]", "[1, 5, 2, 3]"),
    ),
    "a single pair, gallery": (
        lambda matcher: matcher(maps(1, C, H, W), maps(1, C, H, W)),
        ValueError,
        ("more than one", "got 1", "eval()"),
    ),
    "a single pair, same": (
        lambda matcher: matcher(maps(1, C, H, W), "same"),
        ValueError,
        ("more than one", "got 1", "eval()"),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matcher(case: tuple[Call, type[Exception], tuple[str, ...]]) -> None:
    call, error, restated = case
    matcher = build()
    with refused(error, restated, matcher):
        call(matcher)
    matcher(maps(seed=7), labels=labels()).square().sum().backward()  # now with a graph, gradients and statistics
    matcher.bn.eval()
    with refused(error, restated, matcher):
        call(matcher)


CALLS: dict[str, Call] = {
    "labels": lambda matcher: matcher(maps(), labels=labels()),
    "class_scores": lambda matcher: matcher.class_scores(maps(), labels()),
    "all classes": lambda matcher: matcher(maps()),
    "gallery": lambda matcher: matcher(maps(), maps(seed=2)),
    "same": lambda matcher: matcher(maps(), "same"),
}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_failure_between_the_norms_updates_neither(
    call: Call, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out after `bn` and before `logit_bn`; the step is tried again, and must count once."""
    matcher, expected = build(), build()
    original, calls = scores_module._scale_and_shift, []

    def failing(norm: torch.nn.BatchNorm1d, variance: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(norm)
        if norm is matcher.logit_bn:
            raise error("out of memory")
        return original(norm, variance)

    monkeypatch.setattr(scores_module, "_scale_and_shift", failing)
    with refused(error, ("out of memory",), matcher):
        call(matcher)
    assert calls == [matcher.bn, matcher.logit_bn]
    monkeypatch.undo()
    call(matcher)
    call(expected)
    for name, buffer in expected.named_buffers():
        assert torch.equal(matcher.get_buffer(name), buffer), name
    assert matcher.bn.num_batches_tracked == 1


def test_a_failure_after_the_scores_updates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = build()

    def failing(scores: ClassScores, fill: float = 0.0) -> Tensor:
        raise MemoryError("dense scores")

    monkeypatch.setattr(ClassScores, "to_dense", failing)
    with refused(MemoryError, ("dense scores",), matcher):
        matcher(maps(), labels=labels())


def test_a_failed_call_leaves_the_kernel_and_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = build()
    matcher.make_kernel(maps(3, C, H, W))

    def failing(*_: Any) -> None:
        raise MemoryError("statistics")

    monkeypatch.setattr(torch, "_foreach_copy_", failing)
    with refused(MemoryError, ("statistics",), matcher):
        matcher(maps())


@pytest.mark.parametrize("target", [None, labels()], ids=["all classes", "labels"])
def test_the_visibility_warning_as_an_error_comes_before_the_update(target: Tensor | None) -> None:
    matcher, veil = build(), torch.ones(N, 1, H, W)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with refused(UserWarning, ("gal_occ",), matcher):
                matcher(maps(), labels=target, gal_occ=veil)


def test_an_error_does_not_spend_the_warning() -> None:
    matcher = build()
    veil = torch.ones(N, 1, H, W)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with refused(IndexError, ("[8]",), matcher):
            matcher(maps(), labels=labels(3, 8, 0, 1), gal_occ=veil)
    assert caught == []
    with pytest.warns(UserWarning, match="gal_occ"):
        matcher(maps(), labels=labels(), gal_occ=veil)


GALLERY_CASES = {
    name: case
    for name, case in CASES.items()
    if name.startswith(("forward, probe", "visibility of probe", "make_kernel"))
}


@pytest.mark.parametrize("case", GALLERY_CASES.values(), ids=GALLERY_CASES.keys())
def test_a_pending_kernel_stays_pending(case: tuple[Call, type[Exception], tuple[str, ...]]) -> None:
    call, error, restated = case
    matcher = build()
    matcher.make_kernel(maps(2, C, H, W))
    with refused(error, restated, matcher):
        call(matcher)
    assert matcher(maps()).shape == (B, 2)


@pytest.mark.parametrize(
    ("call", "error", "restated"),
    [
        (lambda matcher: matcher(maps(B, C, W, H)), ValueError, ("[4, 5, 3, 2]",)),
        (lambda matcher: matcher(maps(), gal_occ=torch.ones(3, 1, H, W)), ValueError, ("gal_occ", "[3, 1, 2, 3]")),
        (lambda matcher: matcher(maps(1, C, H, W)), ValueError, ("got 1",)),
    ],
    ids=["probe", "visibility of the kernel", "single pair"],
)
def test_a_kernel_that_could_not_be_used_stays(call: Call, error: type[Exception], restated: tuple[str, ...]) -> None:
    matcher = build()
    matcher.make_kernel(maps(1, C, H, W))
    with refused(error, restated, matcher):
        call(matcher)
    assert matcher(maps()).shape == (B, 1)


@pytest.mark.parametrize("built", [False, True], ids=["lazy graph", "graph built"])
def test_a_single_pair_of_classes(built: bool) -> None:
    """One sample and one neighbour: batch statistics of one score."""
    matcher = build(k_nearest=1)
    if built:
        matcher.compute_class_neighbors()
    for call in (
        lambda: matcher(maps(1, C, H, W), labels=labels(3)),
        lambda: matcher.class_scores(maps(1, C, H, W), labels(3)),
    ):
        with refused(ValueError, ("more than one", "got 1"), matcher):
            call()
    matcher.logit_bn.eval()
    assert matcher(maps(1, C, H, W), labels=labels(3)).count_nonzero() == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda matcher: matcher(maps()),
        lambda matcher: matcher(maps(), labels=labels()),
        lambda matcher: matcher(maps(), gal_occ=torch.ones(B, 1, H, W)),
        lambda matcher: matcher.class_scores(maps(), labels()),
        lambda matcher: matcher.compute_class_neighbors(),
        lambda matcher: SoftmaxTripletLoss(matcher)(maps(), labels()),
    ],
    ids=["all classes", "labels", "gal_occ", "class_scores", "compute_class_neighbors", "SoftmaxTripletLoss"],
)
def test_no_class_table(call: Call) -> None:
    matcher = build(num_classes=None)
    with refused(ValueError, ("num_classes",), matcher):
        call(matcher)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_broken_class_table(value: float, dtype: torch.dtype) -> None:
    matcher = build().to(dtype)
    assert matcher.class_embed is not None
    with torch.no_grad():
        matcher.class_embed[6, 1, 1, 2] = value
        matcher.class_embed[2, 4, 0, 0] = value
    feature = maps().to(dtype)
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


def test_an_old_graph_survives_a_broken_table() -> None:
    matcher = build()
    matcher.compute_class_neighbors()
    assert matcher.class_embed is not None
    with torch.no_grad():
        matcher.class_embed[6] = torch.nan
    with refused(ValueError, ("1 of 8 classes", "[6]"), matcher):
        matcher.compute_class_neighbors()


@pytest.mark.parametrize("k", [0, N, 2 * N])
def test_k_set_out_of_range_later(k: int) -> None:
    matcher = build()
    matcher.compute_class_neighbors()
    matcher.k_nearest = k
    for call in (matcher.compute_class_neighbors, lambda: matcher(maps(), labels=labels())):
        with refused(ValueError, (f"got {k}", "7"), matcher):
            call()


# --- losses and functions ---------------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[[QAConv], torch.nn.Module]] = {
    "PairwiseMatchingLoss": PairwiseMatchingLoss,
    "TripletLoss": TripletLoss,
    "SoftmaxTripletLoss": SoftmaxTripletLoss,
    "ClassMemoryLoss": lambda matcher: ClassMemoryLoss(matcher, N, C, H, W),
}
LOSS_CASES: dict[str, tuple[Tensor, Any, type[Exception], tuple[str, ...]]] = {
    "H and W swapped": (maps(B, C, W, H), labels(), ValueError, ("[4, 5, 3, 2]",)),
    "3-D": (maps(C, H, W), labels(), ValueError, ("[5, 2, 3]",)),
    "integer features": (maps().long(), labels(), TypeError, ("torch.int64",)),
    "another device": (maps().to(META), labels().to(META), ValueError, ("meta", "cpu")),
    "short labels": (maps(), labels(3, 0), ValueError, ("[4]", "[2]")),
    "float labels": (maps(), labels().float(), TypeError, ("torch.float32",)),
}


@pytest.mark.parametrize("case", LOSS_CASES.values(), ids=LOSS_CASES.keys())
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())
def test_losses(
    make: Callable[[QAConv], torch.nn.Module], case: tuple[Tensor, Any, type[Exception], tuple[str, ...]]
) -> None:
    feature, target, error, restated = case
    matcher = build()
    loss = make(matcher)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    with refused(error, restated, matcher):
        loss(feature, target)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


@pytest.mark.parametrize("name", ["SoftmaxTripletLoss", "ClassMemoryLoss"])
@pytest.mark.parametrize("value", [-1, N])
def test_losses_over_classes_check_the_range(name: str, value: int) -> None:
    matcher = build()
    loss = LOSSES[name](matcher)
    before = {key: tensor.clone() for key, tensor in loss.state_dict().items()}
    with refused(IndexError, ("[0, 8)", f"[{value}]"), matcher):
        loss(maps(), labels(3, value, 3, 0))
    assert all(torch.equal(tensor, before[key]) for key, tensor in loss.state_dict().items())


def test_an_error_in_the_pairs_leaves_the_class_path_undone() -> None:
    """SoftmaxTripletLoss scores classes, then pairs: what fails the second must not have changed the first."""
    matcher = build(k_nearest=2)
    with refused(ValueError, ("got 1",), matcher):
        SoftmaxTripletLoss(matcher)(maps(1, C, H, W), labels(3))


def test_softmax_triplet_options() -> None:
    matcher = build()
    with refused(ValueError, ("background", "'nothing'"), matcher):
        SoftmaxTripletLoss(matcher, background="nothing")  # type: ignore[arg-type]
    with refused(ValueError, ("ignore", "include_self=False"), matcher):
        SoftmaxTripletLoss(matcher, background="ignore")


@pytest.mark.parametrize(
    ("call", "error", "restated"),
    [
        (lambda: qf.class_neighbors(torch.eye(4), 0), ValueError, ("got 0",)),
        (lambda: qf.class_neighbors(torch.eye(4), 4), ValueError, ("got 4", "3")),
        (lambda: qf.class_neighbors(torch.eye(4), 1.0), TypeError, ("float",)),  # type: ignore[call-overload]
        (lambda: qf.class_neighbors(torch.ones(4), 1), ValueError, ("[4]",)),
        (lambda: qf.class_neighbors(torch.ones(4, 2, 2), 1), ValueError, ("[4, 2, 2]",)),
        (lambda: qf.class_neighbors(torch.eye(4).long(), 1), TypeError, ("torch.int64",)),
        (lambda: qf.class_neighbors(torch.eye(4).to(torch.complex64), 1), TypeError, ("torch.complex64",)),
        (lambda: qf.class_neighbors(torch.eye(3) / 0, 1), ValueError, ("3 of 3", "[0, 1, 2]")),
        (lambda: qf.class_neighbors(torch.eye(4), 1, progress=5), TypeError, ("progress", "5")),  # type: ignore[call-overload]
        (lambda: qf.class_neighbors(torch.eye(4), 1, rescore=1), TypeError, ("rescore", "1")),  # type: ignore[call-overload]
        (lambda: qf.class_neighbors(torch.eye(4), 1, return_similarities=1), TypeError, ("return_similarities",)),  # type: ignore[call-overload]
        (lambda: qf.class_neighbors(torch.eye(4), 1, device="foo"), ValueError, ("device", "'foo'")),
        (lambda: qf.class_neighbors(torch.eye(4), 1, device=3.0), TypeError, ("device", "float")),  # type: ignore[call-overload]
        (lambda: qf.class_neighbors(torch.eye(4), 1, device="meta"), ValueError, ("meta",)),
        (lambda: qf.class_neighbors(torch.eye(4, device=META), 1), ValueError, ("meta",)),
        (lambda: qf.class_neighbors(torch.eye(4).to_sparse(), 1), TypeError, ("dense", "sparse_coo")),
        (
            lambda: qf.class_neighbors(torch.eye(4), 1, previous=labels()[:, None].to(META)),
            ValueError,
            ("previous", "meta"),
        ),
        (lambda: qf.topk_cosine(torch.eye(4), torch.eye(4).to_sparse(), 1), TypeError, ("keys", "sparse_coo")),
        (lambda: qf.max_correlation(maps(), maps().to_sparse()), TypeError, ("gallery", "sparse_coo")),
        (lambda: qf.topk_cosine(torch.eye(4), torch.eye(3), 1), ValueError, ("[4, 4]", "[3, 3]")),
        (lambda: qf.topk_cosine(maps(2, C, H, W), maps(2, C, W, H), 1), ValueError, ("[2, 5, 2, 3]", "[2, 5, 3, 2]")),
        (lambda: qf.topk_cosine(torch.eye(4), torch.eye(4), 5), ValueError, ("got 5", "4")),
        (lambda: qf.topk_cosine(torch.eye(4), torch.eye(4), 0), ValueError, ("got 0",)),
        (lambda: qf.topk_cosine(torch.eye(4), torch.eye(4).double(), 1), TypeError, ("float32", "float64")),
        (lambda: qf.topk_cosine(torch.eye(4), torch.eye(4, device=META), 1), ValueError, ("cpu", "meta")),
        (lambda: qf.max_correlation(maps(), maps(B, C, W, H)), ValueError, ("[B, 5, 2, 3]", "[4, 5, 3, 2]")),
        (lambda: qf.max_correlation(maps(), maps().to(META)), ValueError, ("meta", "cpu")),
        (lambda: qf.max_correlation(maps().int(), maps()), TypeError, ("torch.int32",)),
        (lambda: qf.max_correlation(maps(), maps(), labels()), ValueError, ("index", "[4]")),
        (lambda: qf.max_correlation(maps(), maps(), labels()[:3, None]), ValueError, ("index", "[3, 1]")),
        (lambda: qf.max_correlation(maps(), maps(), labels()[:, None].int()), TypeError, ("index", "torch.int32")),
        (lambda: qf.max_correlation(maps(), maps(), labels()[:, None]), IndexError, ("index", "[0, 4)", "[7]")),
        (lambda: qf.max_correlation(maps(), maps(), -labels()[:, None]), IndexError, ("index", "[-3, -3, -7]")),
        (
            lambda: qf.max_correlation(maps(), maps(), probe_occ=torch.ones(B, 1, W, H)),
            ValueError,
            ("probe_occ", "[4, 1, 3, 2]"),
        ),
        (
            lambda: qf.max_correlation(maps(), maps(), gallery_occ=torch.ones(B, 1, W, H)),
            ValueError,
            ("gallery_occ", "[4, 1, 3, 2]"),
        ),
    ],
)
def test_functions(call: Callable[[], Any], error: type[Exception], restated: tuple[str, ...]) -> None:
    with refused(error, restated):
        call()


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "cuda")
    matcher = build()
    with refused(ValueError, ("QACONV_TRITON_BACKEND", "'cuda'"), matcher):
        matcher(maps(), "same")
    with refused(ValueError, ("QACONV_TRITON_BACKEND", "'cuda'"), matcher):
        matcher(maps(), labels=labels())


def test_compiled_kernels_refuse_tensors_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QACONV_TRITON_BACKEND", "triton")
    monkeypatch.setattr(config, "INTERPRETED", False)
    matcher = build()
    for call in (*CALLS.values(), lambda matcher: matcher.match(maps(), maps())):
        with refused(RuntimeError, ("QACONV_TRITON_BACKEND=triton", "TRITON_INTERPRET=1", "got cpu"), matcher):
            call(matcher)
    assert matcher.double()(maps().double(), "same").shape == (B, B)  # fp64 is never for the kernels


@pytest.mark.parametrize("value", ["yes", "true", "2", " 1"])
def test_unknown_value_of_the_checks_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(validation.CHECKS_VARIABLE, value)
    matcher = build()
    with refused(ValueError, ("QACONV_TRITON_CHECKS", repr(value)), matcher):
        matcher(maps(), labels=labels())
    with refused(ValueError, ("QACONV_TRITON_CHECKS", repr(value))):
        qf.max_correlation(maps(), maps(), torch.zeros(B, 1, dtype=torch.int64))


# --- derivatives that there are not -----------------------------------------------------------------------------------

Function = Callable[[Tensor], Tensor]
OTHER = maps(seed=2)
TOPK = (2, None, None, None, None)
FUNCTIONS: dict[str, Function] = {
    "functional.max_correlation": lambda probe: qf.max_correlation(probe, OTHER),
    "functional.max_correlation, gallery": lambda gallery: qf.max_correlation(OTHER, gallery),
    "functional.topk_cosine": lambda queries: qf.topk_cosine(queries, OTHER, 2)[0],
    "functional.class_neighbors": lambda table: qf.class_neighbors(table, 2, return_similarities=True)[0],
    "ops.max_correlation": lambda probe: ops.max_correlation(probe, OTHER, None, None, False, False)[0],
    "ops.pair_sums": lambda probe: ops.pair_sums(probe, OTHER, None, None, False, torch.ones(2 * H * W)),
    "ops.cosine_topk": lambda queries: ops.cosine_topk(queries.flatten(1), OTHER.flatten(1), *TOPK)[0],
    "matcher, classes": lambda feature: MATCHER.class_scores(feature, labels()).values,
    "matcher, same": lambda feature: MATCHER(feature, "same"),
    "match": lambda feature: MATCHER.match(feature, OTHER),
}
MATCHER = build().eval()


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_forward_mode_is_refused(function: Function) -> None:
    """Torch drops the tangents of an operation that knows nothing of them: a derivative of zero."""
    with pytest.raises(RuntimeError, match=r"forward.mode"):
        torch.func.jvp(function, (maps(),), (maps(seed=3),))
    for gradient in (False, True):
        with forward_ad.dual_level(), pytest.raises(RuntimeError):
            function(forward_ad.make_dual(maps().requires_grad_(gradient), maps(seed=3)))


def test_forward_mode_of_many_tangents_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"forward.mode"):
        torch.func.jacfwd(FUNCTIONS["functional.max_correlation"])(maps())


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_double_backward_is_refused(function: Function) -> None:
    feature = maps().requires_grad_()
    values = function(feature)
    if not values.requires_grad:  # not differentiable at all
        return
    weight = torch.ones_like(values, requires_grad=True)

    def differentiate_twice() -> None:
        (first,) = torch.autograd.grad(values, feature, weight, create_graph=True)
        torch.autograd.grad(first.sum(), weight)

    with pytest.raises(RuntimeError):
        differentiate_twice()


def test_forward_mode_over_a_backward_pass_is_refused() -> None:
    feature = maps().requires_grad_()
    pooled = qf.max_correlation(feature, maps(seed=2))
    with forward_ad.dual_level():
        tangent = forward_ad.make_dual(torch.ones_like(pooled), torch.ones_like(pooled))
        with pytest.raises(RuntimeError, match=r"forward.mode"):
            torch.autograd.grad(pooled, feature, tangent)


# --- invalid labels where they are not read back, as on CUDA ----------------------------------------------------------


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the branch of CUDA tensors: no value is looked at."""
    for module in (validation, matcher_module):
        monkeypatch.setattr(module, "values_may_be_read", lambda tensor: False)


def test_when_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
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


BAD = {"first": [-1, 3, 3, 7, 1], "repeated": [3, 8, 3, 8, 1], "many": [-1, 99, 3, 7, -(2**40)]}
with_bad_labels = pytest.mark.parametrize("values", BAD.values(), ids=BAD.keys())


@pytest.mark.usefixtures("unread")
@with_bad_labels
@pytest.mark.parametrize("mode", ["train", "eval", "frozen bn"])
@pytest.mark.parametrize(("include_self", "sparse_grad"), [(False, False), (True, True)])
def test_invalid_rows_are_nan_and_count_nowhere(
    cpu_backend: str, values: list[int], mode: str, include_self: bool, sparse_grad: bool
) -> None:
    """Scores, statistics and gradients are those of the batch without the invalid rows."""
    target = torch.tensor(values)
    good = (target >= 0) & (target < N)
    weight = maps(len(values), K + include_self, seed=3)
    results = []
    for selected in (torch.ones_like(good), good):
        matcher = build(include_self=include_self, sparse_grad=sparse_grad).train(mode != "eval")
        matcher.bn.train(mode == "train")
        feature = maps(len(values), C, H, W)[selected].requires_grad_()
        veil = torch.rand(len(values), 1, H, W, generator=torch.Generator().manual_seed(5))[selected].requires_grad_()
        scores = matcher.class_scores(feature, target[selected], veil)
        (scores.values * weight[selected]).nansum().backward()
        results.append((matcher, feature, veil, scores))
    (matcher, feature, veil, scores), (expected, good_feature, good_veil, good_scores) = results
    assert scores.values[~good].isnan().all()
    assert (scores.classes[~good] == -1).all()
    assert torch.equal(scores.classes[good], good_scores.classes)
    close(scores.values[good], good_scores.values)
    for name, buffer in expected.named_buffers():
        close(matcher.get_buffer(name), buffer)
    for name, parameter in expected.named_parameters():
        assert parameter.grad is not None
        found = matcher.get_parameter(name).grad
        assert found is not None
        assert found.layout == parameter.grad.layout
        close(found.to_dense(), parameter.grad.to_dense())
    for found, wanted in ((feature.grad, good_feature.grad), (veil.grad, good_veil.grad)):
        assert found is not None
        assert wanted is not None
        assert found[~good].eq(0).all()
        assert wanted.abs().max() > 1e-3
        close(found[good], wanted)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5 * max(1.0, float(expected.detach().abs().max())))


@pytest.mark.usefixtures("unread")
@with_bad_labels
def test_invalid_rows_of_the_dense_scores_are_nan(values: list[int]) -> None:
    target = torch.tensor(values)
    good = (target >= 0) & (target < N)
    matcher, expected = build(), build()
    dense = matcher(maps(len(values), C, H, W), labels=target)
    assert dense.shape == (len(values), N)
    assert dense[~good].isnan().all()
    close(dense[good], expected(maps(len(values), C, H, W)[good], labels=target[good]))
    assert not dense[good].isnan().any()


@pytest.mark.usefixtures("unread")
def test_gradients_are_finite_through_the_dense_scores(cpu_backend: str) -> None:
    matcher = build()
    feature = maps().requires_grad_()
    dense = matcher(feature, labels=labels(3, -1, 8, 7))
    dense.nan_to_num(0.0).square().sum().backward()
    assert feature.grad is not None
    assert feature.grad.isfinite().all()
    assert feature.grad[[1, 2]].eq(0).all()
    assert feature.grad[[0, 3]].abs().max() > 0
    for name, parameter in matcher.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all(), name


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_only_invalid_labels(cpu_backend: str, mode: str) -> None:
    matcher = build().train(mode == "train")
    before = {name: value.clone() for name, value in matcher.state_dict().items() if "tracked" not in name}
    feature = maps().requires_grad_()
    scores = matcher.class_scores(feature, labels(-1, 8, 9, -7)).values
    assert scores.isnan().all()
    scores.sum().backward()
    assert feature.grad is not None
    assert feature.grad.eq(0).all()
    for name, parameter in matcher.named_parameters():
        assert parameter.grad is None or parameter.grad.eq(0).all(), name
    for name, value in before.items():
        assert torch.equal(matcher.state_dict()[name], value), name


@pytest.mark.usefixtures("unread")
def test_valid_labels_score_the_same_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    unread, read = build(), build()
    actual = unread(maps(), labels=labels())
    monkeypatch.undo()
    close(actual, read(maps(), labels=labels()))
    for name, buffer in read.named_buffers():
        close(unread.get_buffer(name), buffer)


@pytest.mark.usefixtures("unread")
def test_wrong_dtype_and_length_are_refused_unread_too() -> None:
    matcher = build()
    for bad, error in ((labels().float(), TypeError), (labels(1, 2), ValueError), (labels().to(META), ValueError)):
        with refused(error, ("labels",), matcher):
            matcher(maps(), labels=bad)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("background", ["zero", "ignore"])
def test_loss_of_an_invalid_target_is_nan(background: Any) -> None:
    matcher = build(include_self=True)
    loss = SoftmaxTripletLoss(matcher, background=background)(maps(), labels(3, -1, 3, 8))
    assert loss[0].isnan().tolist() == [False, True, False, True]
    assert loss[3].tolist()[1] == 0
    assert not loss[1].isnan().any()


@pytest.mark.cuda
def test_invalid_labels_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(validation.CHECKS_VARIABLE, raising=False)
    matcher = build().cuda()
    bad = labels(3, -1, 8, 7).cuda()
    dense = matcher(maps().cuda(), labels=bad)
    assert dense.isnan().any(1).tolist() == [False, True, True, False]
    assert dense.isnan().all(1).tolist() == [False, True, True, False]
    monkeypatch.setenv(validation.CHECKS_VARIABLE, "1")
    with pytest.raises(IndexError, match=r"\[-1, 8\]"):
        matcher(maps().cuda(), labels=bad)
