"""QAConv against an eager fp64 model of it: values, running statistics, gradients, the graph's life, bad days."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qaconv_triton import QAConv, cpu, functional
from qaconv_triton import matcher as matcher_module

C, H, W, N, K = 5, 2, 3, 8, 3
S = H * W
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
LABELS = [3, 0, 3, 7, 1]
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}  # of a tensor's largest entry
MODES = ["train", "eval", "frozen bn", "frozen logit_bn"]


class Eager(nn.Module):
    """QAConv written out: every correlation at once, fp64, torch's own batch norms."""

    def __init__(self, matcher: QAConv) -> None:
        super().__init__()
        self.bn, self.fc, self.logit_bn = (
            copy.deepcopy(part).double() for part in (matcher.bn, matcher.fc, matcher.logit_bn)
        )
        if matcher.class_embed is not None:
            self.class_embed = nn.Parameter(matcher.class_embed.detach().to(torch.float64).contiguous())
        self.k_nearest, self.include_self = matcher.k_nearest, matcher.include_self

    def neighbors(self) -> Tensor:
        flat = F.normalize(self.class_embed.detach().flatten(1), dim=1)
        similarity = flat @ flat.T
        lists = []
        for own, row in enumerate(similarity.tolist()):
            others = [other for other in range(len(row)) if other != own]
            lists.append(sorted(others, key=lambda other, row=row: (-row[other], other))[: self.k_nearest])
        return torch.tensor(lists, device=DEVICE)

    def pooled(self, probe: Tensor, gallery: Tensor, prob_occ: Tensor | None, gal_occ: Tensor | None) -> Tensor:
        probe, gallery = (F.normalize(maps, dim=1).flatten(2) for maps in (probe, gallery))
        corr = torch.einsum("pcs,gcr->pgrs", probe, gallery)
        if prob_occ is not None:
            corr = corr * prob_occ.flatten(1)[:, None, None, :]
        if gal_occ is not None:
            corr = corr * gal_occ.flatten(1)[None, :, :, None]
        return torch.cat([corr.max(dim=2).values, corr.max(dim=3).values], dim=-1)

    def score(self, pooled: Tensor) -> Tensor:
        values = self.bn(pooled.reshape(-1, 1)).view(-1, pooled.shape[-1])
        return self.logit_bn(self.fc(values)).view(pooled.shape[:-1])

    def class_lists(self, labels: Tensor) -> Tensor:
        lists = self.neighbors()[labels]
        return torch.cat([lists, labels[:, None]], dim=1) if self.include_self else lists

    def forward(
        self,
        prob_fea: Tensor,
        gal_fea: Tensor | str | None = None,
        labels: Tensor | None = None,
        prob_occ: Tensor | None = None,
        gal_occ: Tensor | None = None,
    ) -> Tensor:
        if isinstance(gal_fea, str):
            gal_fea = prob_fea
        if gal_fea is not None:
            return self.score(self.pooled(prob_fea, gal_fea, prob_occ, gal_occ))
        if labels is None:
            return self.score(self.pooled(prob_fea, self.class_embed, prob_occ, None))
        lists = self.class_lists(labels)
        rows = []
        for sample, row in enumerate(lists):
            visible = None if prob_occ is None else prob_occ[sample : sample + 1]
            rows.append(self.pooled(prob_fea[sample : sample + 1], self.class_embed[row], visible, None)[0])
        dense = torch.zeros(len(labels), len(self.class_embed), dtype=torch.float64, device=DEVICE)
        return dense.scatter(1, lists, self.score(torch.stack(rows)))


def build(dtype: torch.dtype = torch.float32, mode: str = "train", **options: Any) -> QAConv:
    """A matcher none of whose parameters and statistics is at its initial value."""
    torch.manual_seed(0)
    matcher = QAConv(C, H, W, **options).to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in (*matcher.bn.parameters(), *matcher.fc.parameters(), *matcher.logit_bn.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
        for norm, mean, variance in ((matcher.bn, 0.4, 0.3), (matcher.logit_bn, 1.1, 0.6)):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.fill_(mean)
            norm.running_var.fill_(variance)
    return set_mode(matcher, mode)


def set_mode(matcher: QAConv, mode: str) -> QAConv:
    matcher.train(mode != "eval")
    if mode == "frozen bn":
        matcher.bn.eval()
    if mode == "frozen logit_bn":
        matcher.logit_bn.eval()
    return matcher


def ids(values: list[int]) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def maps(count: int, seed: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (C, H, W)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def visibility(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, H, W, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "scores", floor: float = 0.1) -> None:
    """Within `tolerance` of the largest expected entry (a gradient that is zero in truth is held to `floor`)."""
    assert actual.shape == expected.shape, name
    scale = max(float(expected.detach().abs().max()), floor) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.detach().double().cpu(),
        expected.detach().double().cpu(),
        rtol=0.0,
        atol=tolerance * scale,
        msg=lambda text: f"{name}: {text}",
    )


def leaves(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Copies of the inputs, the floating ones in `dtype` and asking for gradients."""
    return {
        name: value.detach().to(dtype, copy=True).requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def gradients(scores: Tensor, inputs: dict[str, Any], module: nn.Module) -> dict[str, Tensor | None]:
    """Gradients of a weighted sum of the scores, whose weights are all different."""
    weight = torch.randn(scores.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (scores * weight.to(scores)).sum().backward()
    found = {name: value.grad for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}
    found.update({name: parameter.grad for name, parameter in module.named_parameters()})
    return found


def assert_as_eager(
    matcher: QAConv, inputs: dict[str, Any], call: Callable[[dict[str, Any]], Tensor] | None = None
) -> None:
    """Scores, running statistics and every gradient of `matcher(**inputs)` are those of the eager model."""
    dtype = matcher.fc.weight.dtype
    tolerance = TOLERANCE[dtype]
    eager = Eager(matcher)
    expected_inputs, actual_inputs = leaves(inputs, torch.float64), leaves(inputs, dtype)
    expected = eager(**expected_inputs)
    actual = matcher(**actual_inputs) if call is None else call(actual_inputs)
    assert actual.dtype == dtype
    assert float(expected.detach().std()) > 0.1  # nothing constant would pass
    assert_close(actual, expected, tolerance)
    for name, buffer in eager.named_buffers():
        assert_close(matcher.get_buffer(name), buffer, tolerance, name)
    expected_gradients = gradients(expected, expected_inputs, eager)
    actual_gradients = gradients(actual, actual_inputs, matcher)
    assert actual_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        found = actual_gradients[name]
        if gradient is None:
            assert found is None, name
        else:
            assert found is not None, name
            assert_close(found, gradient, tolerance, f"gradient of {name}")


def class_inputs(dtype: torch.dtype, occluded: bool) -> dict[str, Any]:
    inputs: dict[str, Any] = {"prob_fea": maps(len(LABELS), 1, dtype), "labels": ids(LABELS)}
    return {**inputs, "prob_occ": visibility(len(LABELS), 2, dtype)} if occluded else inputs


def gallery_inputs(dtype: torch.dtype, occluded: bool) -> dict[str, Any]:
    inputs: dict[str, Any] = {"prob_fea": maps(4, 1, dtype), "gal_fea": maps(3, 3, dtype)}
    if occluded:
        inputs |= {"prob_occ": visibility(4, 2, dtype), "gal_occ": visibility(3, 4, dtype)}
    return inputs


with_modes = pytest.mark.parametrize("mode", MODES)
with_occlusion = pytest.mark.parametrize("occluded", [False, True], ids=["visible", "occluded"])
with_own_class = pytest.mark.parametrize("include_self", [False, True], ids=["neighbours", "and itself"])


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
    monkeypatch.setattr(cpu, "BLOCK", block)
    monkeypatch.setattr(matcher_module, "POOLED_BYTES", 16 * S * (block % 7))
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


@pytest.mark.parametrize("pooled_bytes", [1, 16 * S * 3, 16 * S * 100])
def test_match_in_tiles(monkeypatch: pytest.MonkeyPatch, pooled_bytes: int) -> None:
    matcher = build(torch.float64)
    arguments = tuple(gallery_inputs(torch.float64, occluded=True).values())
    expected = Eager(matcher).eval()(arguments[0], arguments[1], None, *arguments[2:])
    monkeypatch.setattr(matcher_module, "POOLED_BYTES", pooled_bytes)
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
    matcher.bn = nn.BatchNorm1d(1, track_running_stats=False).double().train(mode == "train")
    assert_as_eager(matcher, gallery_inputs(torch.float64, occluded=True))


# --- the class graph --------------------------------------------------------------------------------------------------


@pytest.fixture
def built_graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the class tables whose graph was built, in order."""
    sizes: list[int] = []
    original = functional.class_neighbors

    def counted(embeddings: Tensor, k: int, **options: Any) -> Any:
        sizes.append(len(embeddings))
        return original(embeddings, k, **options)

    monkeypatch.setattr(functional, "class_neighbors", counted)
    return sizes


def test_graph_is_lazy_and_cached(built_graphs: list[int]) -> None:
    matcher = build(num_classes=N, k_nearest=K)
    inputs = class_inputs(torch.float32, occluded=False)
    assert matcher.class_neighbors is None
    matcher(maps(4, 1), maps(3, 3))
    matcher(maps(4, 1))
    matcher(maps(4, 1), "same")
    matcher.match(maps(4, 1), maps(3, 3))
    assert matcher.class_neighbors is None
    assert built_graphs == []
    for _ in range(3):
        matcher(**inputs)
        matcher.class_scores(inputs["prob_fea"], inputs["labels"])
    assert built_graphs == [N]
    graph = matcher.class_neighbors
    assert graph is not None
    assert graph.dtype == torch.int64
    assert torch.equal(graph, Eager(matcher).neighbors())


@pytest.mark.parametrize("event", ["on_epoch_start", "reset_class_neighbors", "reset_running_stats", "load_state_dict"])
def test_graph_is_dropped(built_graphs: list[int], event: str) -> None:
    matcher = build(num_classes=N, k_nearest=K)
    inputs = class_inputs(torch.float32, occluded=False)
    matcher(**inputs)
    stale = matcher.class_neighbors
    assert stale is not None
    table = matcher.class_embed
    assert table is not None
    if event == "load_state_dict":
        state = {name: value.clone() for name, value in matcher.state_dict().items()}
        state["class_embed"] = maps(N, 77)
        matcher.load_state_dict(state)
    else:
        with torch.no_grad():
            table.copy_(maps(N, 77))
        matcher(**inputs)
        assert matcher.class_neighbors is stale  # until told, whatever the table does
        getattr(matcher, event)()
    assert matcher.class_neighbors is None
    matcher(**inputs)
    assert built_graphs == [N, N]
    assert torch.equal(matcher.class_neighbors, Eager(matcher).neighbors())  # type: ignore[arg-type]
    assert not torch.equal(matcher.class_neighbors, stale)  # type: ignore[arg-type]


def test_resets_reset_what_they_say() -> None:
    matcher = build(num_classes=N, k_nearest=K)
    matcher(**class_inputs(torch.float32, occluded=False))
    matcher.reset_running_stats()
    for norm in (matcher.bn, matcher.logit_bn):
        assert (norm.running_mean, norm.running_var, norm.num_batches_tracked) == (0, 1, 0)
    assert not torch.equal(matcher.bn.weight, torch.ones(1))
    matcher.compute_class_neighbors()
    old = matcher.class_embed.clone()  # type: ignore[union-attr]
    matcher.reset_parameters()
    assert matcher.class_neighbors is None
    assert torch.equal(matcher.fc.weight, torch.full((1, 2 * S), 1 / S))
    assert (matcher.bn.weight, matcher.bn.bias) == (1, 0)
    table = matcher.class_embed
    assert table is not None
    assert (table != old).all()
    assert 0.8 < float(table.detach().std()) * C**0.5 < 1.2
    assert table.is_contiguous(memory_format=torch.channels_last)


def test_graph_follows_a_new_table_and_k(built_graphs: list[int]) -> None:
    matcher = build(torch.float64, num_classes=N, k_nearest=K)
    inputs = class_inputs(torch.float64, occluded=False)
    with torch.no_grad():
        matcher(**inputs)
    matcher.class_embed = nn.Parameter(maps(N + 3, 55, torch.float64))
    assert matcher.num_classes == N + 3
    assert_as_eager(matcher, inputs)
    matcher.k_nearest = 5
    matcher.zero_grad()
    assert_as_eager(matcher, inputs)
    assert built_graphs == [N, N + 3, N + 3]
    assert matcher.class_neighbors is not None
    assert matcher.class_neighbors.shape == (N + 3, 5)


def test_own_class_is_left_out_by_id(backend: str) -> None:
    """All embeddings coincide: every other class is as near as the class itself, and lower ids come first."""
    matcher = build(num_classes=6, k_nearest=3)
    with torch.no_grad():
        assert matcher.class_embed is not None
        matcher.class_embed.copy_(maps(1, 5).expand(6, C, H, W))
    expected = [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert matcher.compute_class_neighbors().tolist() == expected
    scores = matcher.class_scores(maps(6, 1), torch.arange(6, device=DEVICE))
    assert scores.classes.tolist() == expected


def test_every_other_class_is_a_neighbour(backend: str) -> None:
    matcher = build(num_classes=N, k_nearest=N - 1, include_self=True)
    inputs = class_inputs(torch.float32, occluded=False)
    by_label = matcher.clone()(**inputs)
    assert_close(by_label, matcher(inputs["prob_fea"]), 1e-4)


def test_graph_is_no_part_of_the_state_dict() -> None:
    matcher = build(num_classes=N, k_nearest=K)
    matcher.compute_class_neighbors()
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = {f"{name}.{key}" for name in ("bn", "logit_bn") for key in norm} | {"fc.weight", "fc.bias"}
    state = matcher.state_dict()
    assert set(state) == keys | {"class_embed"}
    assert set(QAConv(C, H, W).state_dict()) == keys
    assert state["fc.weight"].shape == (1, 2 * S)
    assert state["fc.bias"].shape == (1,)
    assert state["class_embed"].shape == (N, C, H, W)
    assert set(dict(matcher.named_parameters())) == {key for key in keys | {"class_embed"} if "running" not in key} - {
        "bn.num_batches_tracked",
        "logit_bn.num_batches_tracked",
    }
    assert matcher.half().class_neighbors.dtype == torch.int64  # type: ignore[union-attr]


# --- initial values and layout ----------------------------------------------------------------------------------------


def test_initial_values() -> None:
    torch.manual_seed(3)
    matcher = QAConv(C, H, W, num_classes=N, k_nearest=K)
    torch.manual_seed(3)
    linear = nn.Linear(2 * S, 1)
    table = torch.randn(N, C, H, W) / C**0.5
    assert torch.equal(matcher.fc.weight, torch.full((1, 2 * S), 1 / S))
    assert torch.equal(matcher.fc.bias, linear.bias)
    assert matcher.class_embed is not None
    torch.testing.assert_close(matcher.class_embed.detach(), table, rtol=1e-6, atol=0.0)
    for norm in (matcher.bn, matcher.logit_bn):
        assert (norm.weight, norm.bias, norm.running_mean, norm.running_var) == (1, 0, 0, 1)
        assert (norm.eps, norm.momentum, norm.num_batches_tracked) == (1e-5, 0.1, 0)
    assert not matcher.include_self
    assert QAConv(C, H, W).k_nearest == 20


def through_pickle(matcher: QAConv) -> QAConv:
    loaded = pickle.loads(pickle.dumps(matcher))
    assert isinstance(loaded, QAConv)
    return loaded


def through_save(matcher: QAConv) -> QAConv:
    file = io.BytesIO()
    torch.save(matcher, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, QAConv)
    return loaded


def through_state_dict(matcher: QAConv) -> QAConv:
    other = QAConv(C, H, W, num_classes=N, k_nearest=K).to(DEVICE)
    other.load_state_dict({name: value.contiguous() for name, value in matcher.state_dict().items()})
    return other


@pytest.mark.parametrize(
    "change",
    [
        lambda matcher: matcher.to(torch.bfloat16),
        lambda matcher: matcher.half().float(),
        lambda matcher: matcher.double(),
        lambda matcher: matcher.to(DEVICE, non_blocking=True),
        copy.deepcopy,
        lambda matcher: matcher.clone(),
        through_pickle,
        through_save,
        through_state_dict,
    ],
    ids=["bf16", "half", "double", "device", "deepcopy", "clone", "pickle", "save", "state_dict"],
)
def test_table_stays_channels_last(change: Callable[[QAConv], QAConv]) -> None:
    matcher = build(num_classes=N, k_nearest=K)
    expected = matcher.class_embed.detach().clone()  # type: ignore[union-attr]
    table = change(matcher).class_embed
    assert isinstance(table, nn.Parameter)
    assert table.shape == (N, C, H, W)
    assert table.is_contiguous(memory_format=torch.channels_last)
    assert not table.is_contiguous()
    assert_close(table, expected, 1e-2 if table.dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
def test_any_layout_does(backend: str, sparse_grad: bool) -> None:
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        matcher = build(num_classes=N, k_nearest=K, sparse_grad=sparse_grad)
        assert matcher.class_embed is not None
        matcher.class_embed = nn.Parameter(matcher.class_embed.detach().contiguous(memory_format=layout))
        assert matcher.class_embed.is_contiguous(memory_format=layout)
        feature = maps(len(LABELS), 1).contiguous(memory_format=layout).requires_grad_()
        scores = matcher(feature, labels=ids(LABELS)) + matcher(feature, labels=ids(LABELS[::-1]))
        scores.square().sum().backward()
        gradient = matcher.class_embed.grad
        assert gradient is not None
        assert feature.grad is not None
        assert matcher.class_neighbors is not None
        results.append((scores, feature.grad, gradient.to_dense(), matcher.class_neighbors))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_close(actual, expected, 1e-5)


def test_features_of_any_stride(backend: str) -> None:
    matcher = build(mode="eval", num_classes=N, k_nearest=K)
    wide = maps(5, 1, shape=(C, H + 2, W + 1))
    view = wide[:, :, 1:-1, 1:].requires_grad_()
    veil = torch.rand(5, 2, H, W, device=DEVICE)[:, 1:]
    for keyword in ({"labels": ids(LABELS)}, {"gal_fea": "same"}, {"gal_fea": maps(5, 2).flip(0)}):
        plain = matcher(view.detach().clone(memory_format=torch.contiguous_format), prob_occ=veil.clone(), **keyword)
        assert torch.equal(matcher(view, prob_occ=veil, **keyword), plain)


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
        sum(scores.sum() for name, (scores, _) in results.items() if "match" not in name).backward()  # type: ignore[union-attr]
        assert nothing.grad is not None
        assert nothing.grad.shape == (0, C, H, W)
        assert some.grad is None or torch.equal(some.grad, torch.zeros_like(some))


# --- sparse gradients -------------------------------------------------------------------------------------------------


def class_step(sparse_grad: bool, **options: Any) -> QAConv:
    matcher = build(num_classes=N, k_nearest=2, sparse_grad=sparse_grad, **options)
    scores = matcher(maps(4, 1), labels=ids([3, 3, 6, 3]))
    (scores * torch.randn(scores.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)).sum().backward()
    return matcher


@with_own_class
def test_sparse_gradient_is_the_dense_one(backend: str, include_self: bool) -> None:
    sparse, dense = (class_step(sparse_grad, include_self=include_self) for sparse_grad in (True, False))
    assert sparse.class_embed is not None
    assert dense.class_embed is not None
    gradient, expected = sparse.class_embed.grad, dense.class_embed.grad
    assert gradient is not None
    assert expected is not None
    assert gradient.layout == torch.sparse_coo
    assert gradient.sparse_dim() == 1
    assert gradient.shape == expected.shape
    assert expected.layout == torch.strided
    assert sparse.class_neighbors is not None
    touched = {*sparse.class_neighbors[[3, 6]].flatten().tolist(), *([3, 6] if include_self else [])}
    gradient = gradient.coalesce()
    assert gradient.indices().flatten().tolist() == sorted(touched)
    assert len(touched) < N
    torch.testing.assert_close(gradient.to_dense(), expected, rtol=1e-6, atol=1e-7)
    untouched = sorted(set(range(N)) - touched)
    assert expected[untouched].eq(0).all()
    assert (expected[sorted(touched)].flatten(1).abs().amax(1) > 0).all()
    for name, parameter in dense.named_parameters():
        if name != "class_embed":
            torch.testing.assert_close(sparse.get_parameter(name).grad, parameter.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:grad and param do not obey")  # torch's sparse + dense keeps no memory format
def test_sparse_gradients_accumulate() -> None:
    gradients = []
    for sparse_grad in (True, False):
        matcher = class_step(sparse_grad)
        matcher(maps(2, 8), labels=ids([1, 5])).square().sum().backward()
        matcher(maps(2, 9)).square().sum().backward()  # all classes: dense, on top
        assert matcher.class_embed is not None
        assert matcher.class_embed.grad is not None
        gradients.append(matcher.class_embed.grad.to_dense())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_sgd_takes_the_sparse_gradient() -> None:
    tables = []
    for sparse_grad in (True, False):
        matcher = class_step(sparse_grad)
        assert matcher.class_embed is not None
        before = matcher.class_embed.detach().clone()
        torch.optim.SGD(matcher.parameters(), lr=0.5).step()
        assert matcher.class_embed.is_contiguous(memory_format=torch.channels_last)
        tables.append(matcher.class_embed.detach())
        assert float((tables[-1] - before).abs().max()) > 1e-3
    torch.testing.assert_close(*tables, rtol=1e-6, atol=1e-7)


def test_sparse_adam_moves_the_touched_rows() -> None:
    matcher = class_step(sparse_grad=True)
    assert matcher.class_embed is not None
    before, gradient = matcher.class_embed.detach().clone(), matcher.class_embed.grad
    assert gradient is not None
    dense_gradient = gradient.to_dense()
    optimizer = torch.optim.SparseAdam([matcher.class_embed], lr=0.1)
    optimizer.step()
    moved = matcher.class_embed.detach() - before
    expected = -0.1 * dense_gradient / (dense_gradient.abs() + 1e-8)  # Adam's first step
    torch.testing.assert_close(moved, torch.where(dense_gradient == 0, 0.0, expected), rtol=1e-3, atol=1e-5)
    optimizer.zero_grad()
    matcher.on_epoch_start()
    matcher(maps(2, 8), labels=ids([1, 5])).square().sum().backward()
    optimizer.step()
    assert matcher.class_embed.isfinite().all()


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


# --- memory -----------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any tensor made meanwhile has in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.layout == torch.strided:
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

    for name in ("max_correlation", "max_correlation_backward", "cosine_topk"):
        monkeypatch.setattr(cpu, name, observed(getattr(cpu, name)))
    return mode


def class_path_peak(mode: LargestTensor, classes: int, sparse_grad: bool = False) -> int:
    torch.manual_seed(0)
    mode.elements = 0
    matcher = QAConv(2, 4, 4, num_classes=classes, k_nearest=10, sparse_grad=sparse_grad).to(DEVICE)
    feature = maps(6, 1, shape=(2, 4, 4)).requires_grad_()
    with mode:
        matcher(feature, labels=torch.arange(6, device=DEVICE)).square().sum().backward()
    return mode.elements


def test_class_path_never_holds_all_similarities_or_correlations(
    monkeypatch: pytest.MonkeyPatch, largest: LargestTensor
) -> None:
    monkeypatch.setattr(cpu, "BLOCK", 2**9)
    few, many = class_path_peak(largest, 1000), class_path_peak(largest, 2000)
    assert many >= 2000 * 2 * 16  # the table's gradient: the mode does see things
    assert many < 2000 * 2000 // 10
    assert few * 1.5 < many < few * 2.5  # grows with N, not N * N
    correlations = 6 * 10 * 16 * 16
    matcher = QAConv(2, 4, 4, num_classes=20, k_nearest=10).to(DEVICE)
    matcher.compute_class_neighbors()
    feature = maps(6, 1, shape=(2, 4, 4)).requires_grad_()
    largest.elements = 0
    with largest:
        matcher(feature, labels=torch.arange(6, device=DEVICE)).square().sum().backward()
    pooled = 6 * 10 * 2 * 16
    assert pooled <= largest.elements <= 1.5 * pooled < correlations / 5


def test_sparse_step_never_holds_another_table(monkeypatch: pytest.MonkeyPatch, largest: LargestTensor) -> None:
    """With the graph at hand, a step touches the rows it needs only."""
    monkeypatch.setattr(cpu, "BLOCK", 2**9)
    matcher = QAConv(2, 4, 4, num_classes=5000, k_nearest=10, sparse_grad=True).to(DEVICE)
    matcher.class_neighbors = (torch.arange(1, 11).repeat(5000, 1) + torch.arange(5000)[:, None]).to(DEVICE) % 5000
    feature, labels = maps(6, 1, shape=(2, 4, 4)).requires_grad_(), torch.arange(6, device=DEVICE)
    largest.elements = 0
    with largest:
        matcher.class_scores(feature, labels).values.square().sum().backward()
    assert 6 * 10 * 2 * 16 <= largest.elements < 5000


def test_match_holds_a_bounded_number_of_pooled_values(monkeypatch: pytest.MonkeyPatch, largest: LargestTensor) -> None:
    monkeypatch.setattr(cpu, "BLOCK", 2**9)
    monkeypatch.setattr(matcher_module, "POOLED_BYTES", 4 * 2000)
    matcher, probe, gallery = build(), maps(30, 1), maps(40, 3)
    with largest:
        scores = matcher.match(probe, gallery)
    assert scores.shape == (30, 40)
    assert 1200 <= largest.elements <= 2500 < 30 * 40 * 2 * S / 5
