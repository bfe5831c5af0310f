"""`QAConvDistance` in pytorch-metric-learning's losses and miners, and searches for its `AccuracyCalculator`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import DEVICE, C, H, W, make_matcher, maps
from tolerances import assert_close, assert_values
from torch import Tensor

from qaconv_triton import QAConv

pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, InferenceModel, MatchFinder

from qaconv_triton.integrations.metric_learning import QAConvDistance, QAConvKNN, cosine_knn

B = 12
LABELS = torch.arange(B, device=DEVICE) // 3
METRICS = ("precision_at_1", "mean_average_precision", "mean_average_precision_at_r", "r_precision")

Make = Callable[..., Any]
LOSSES: dict[str, Make] = {
    "triplet": lambda distance: losses.TripletMarginLoss(margin=0.5, swap=True, distance=distance),
    "ntxent": lambda distance: losses.NTXentLoss(temperature=0.5, distance=distance),
    "multi-similarity": lambda distance: losses.MultiSimilarityLoss(beta=10, distance=distance),
    "contrastive": lambda distance: losses.ContrastiveLoss(pos_margin=0.9, neg_margin=-0.2, distance=distance),
    "supcon": lambda distance: losses.SupConLoss(temperature=0.5, distance=distance),
    "nca": lambda distance: losses.NCALoss(distance=distance),
}
MINERS: dict[str, Make] = {
    "batch hard": lambda distance: miners.BatchHardMiner(distance=distance),
    "multi-similarity": lambda distance: miners.MultiSimilarityMiner(epsilon=0.05, distance=distance),
    "triplet": lambda distance: miners.TripletMarginMiner(margin=0.3, distance=distance),
    "pairs": lambda distance: miners.PairMarginMiner(pos_margin=0.6, neg_margin=0.1, distance=distance),
}


def cosine_matcher() -> QAConv:
    """Of maps of one location, whose score is their cosine."""
    matcher = QAConv(C, 1, 1).to(DEVICE, torch.float64).eval()
    with torch.no_grad():
        matcher.fc.weight.fill_(0.5)
        matcher.fc.bias.zero_()
    matcher.bn.eps = matcher.logit_bn.eps = 0.0
    return matcher


class Given(BaseDistance):  # type: ignore[misc]
    """A similarity that is there already."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(is_inverted=True, normalize_embeddings=False)
        self.matrix = matrix

    def check_shapes(self, *_: Any) -> None:
        pass

    def compute_mat(self, *_: Any) -> Tensor:
        return self.matrix.clone()


def gradients(loss: Tensor, matcher: QAConv, *others: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, [*matcher.parameters(), *others])
    assert found[-1].abs().max() > 0
    return list(found)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_losses_are_those_of_the_score_matrix(name: str, training: bool) -> None:
    matcher = make_matcher(torch.float64).train(training)
    embeddings = maps(B, 1, torch.float64, (C, H, W)).requires_grad_()
    expected = LOSSES[name](Given(matcher.clone()(embeddings, "same")))(embeddings, LABELS)
    criterion = LOSSES[name](QAConvDistance(matcher))
    assert_close(criterion(embeddings, LABELS), expected, torch.float64)
    scores = matcher(embeddings, "same")
    true = gradients(LOSSES[name](Given(scores))(embeddings, LABELS), matcher, embeddings)
    for layout in (embeddings, embeddings.flatten(1)):
        for got, each in zip(gradients(criterion(layout, LABELS), matcher, embeddings), true, strict=True):
            assert_close(got, each, torch.float64)
    assert {id(each) for each in matcher.parameters()} <= {id(each) for each in criterion.parameters()}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_maps_of_one_location_are_those_of_the_cosine(name: str) -> None:
    embeddings = maps(B, 1, torch.float64, (C, 1, 1)).requires_grad_()
    references, labels = maps(B, 2, torch.float64, (C, 1, 1)), LABELS.flip(0)
    own, theirs = LOSSES[name](QAConvDistance(cosine_matcher())), LOSSES[name](CosineSimilarity())
    flat = embeddings.flatten(1)
    pairs = [(own(embeddings, LABELS), theirs(flat, LABELS))]
    pairs.append(
        (own(embeddings, LABELS, None, references, labels), theirs(flat, LABELS, None, references.flatten(1), labels))
    )
    for got, expected in pairs:
        assert expected > 0
        assert_close(got, expected, torch.float64)
        assert_close(*(torch.autograd.grad(loss, embeddings)[0] for loss in (got, expected)), torch.float64)


@pytest.mark.parametrize("name", MINERS)
def test_miners_find_what_they_find_by_the_cosine(name: str) -> None:
    embeddings = maps(B, 3, torch.float64, (C, 1, 1))
    found = MINERS[name](QAConvDistance(cosine_matcher()))(embeddings, LABELS)
    expected = MINERS[name](CosineSimilarity())(embeddings.flatten(1), LABELS)
    assert expected[0].numel() > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_miner_changes_no_running_statistics() -> None:
    """A step with a miner counts once, and the miner sees the scores that the loss sees."""
    matcher, embeddings = make_matcher(torch.float64), maps(B, 1, torch.float64, (C, H, W)).requires_grad_()
    alone = matcher.clone()
    scores = alone(embeddings, "same")
    distance = QAConvDistance(matcher)
    miner, criterion = miners.BatchHardMiner(distance=distance), losses.TripletMarginLoss(distance=distance)
    found = miner(embeddings, LABELS)
    assert all(map(torch.equal, found, miners.BatchHardMiner(distance=Given(scores))(embeddings, LABELS)))
    criterion(embeddings, LABELS, found)
    for (key, one), other in zip(matcher.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_flattened_and_normalised_embeddings_score_the_same(dtype: torch.dtype) -> None:
    matcher = make_matcher(torch.float64 if dtype == torch.float64 else torch.float32)
    query, reference = maps(B, 1, dtype, (C, H, W)), maps(5, 2, dtype, (C, H, W))
    expected = matcher.clone()(query, reference)
    distance = QAConvDistance(matcher)
    assert distance.is_inverted
    matrix = distance(query, reference)
    assert matrix.dtype == expected.dtype
    assert torch.equal(matrix, expected)
    assert torch.equal(distance(query.flatten(1), reference), expected)
    # `InferenceModel` normalises over dimension 1: locations of maps, or all of a flattened one
    for prepared in (torch.nn.functional.normalize(query), torch.nn.functional.normalize(query.flatten(1))):
        assert_values(distance(prepared, reference), expected, dtype)
    assert torch.equal(distance(query), distance(query, query))


def test_pairwise_distance_is_the_diagonal_in_eval_mode() -> None:
    matcher = make_matcher(torch.float64).eval()
    query, reference = (maps(5, seed, torch.float64, (C, H, W)).requires_grad_() for seed in (1, 2))
    distance = QAConvDistance(matcher)
    pairs = distance.pairwise_distance(query.flatten(1), reference)
    diagonal = distance(query, reference).diagonal()
    assert_close(pairs, diagonal, torch.float64)
    assert_close(*(gradients(each.sum(), matcher, query)[-1] for each in (pairs, diagonal)), torch.float64)
    finder = MatchFinder(distance, threshold=pairs.sort().values[1:3].mean().item())
    assert finder.is_match(query, reference).sum() == 3
    model = InferenceModel(
        torch.nn.Identity(), None, finder, knn_func=cosine_knn, data_device=DEVICE, dtype=torch.float64
    )
    assert model.is_match(query, reference).tolist() == finder.is_match(query, reference).tolist()


def test_a_memory_of_batches_holds_flattened_maps() -> None:
    matcher = make_matcher(torch.float64)
    memory = losses.CrossBatchMemory(
        losses.TripletMarginLoss(margin=5.0, distance=QAConvDistance(matcher)), C * H * W, memory_size=2 * B
    )
    first, second = (maps(B, seed, torch.float64, (C, H, W)).requires_grad_() for seed in (1, 2))
    memory(first.flatten(1), LABELS)
    loss = memory(second.flatten(1), LABELS)
    every = torch.cat([first, second])
    similar = matcher(second, every)
    positive = LABELS.unsqueeze(1) == LABELS.repeat(2)
    positive[:, B:].fill_diagonal_(False)
    own = torch.zeros_like(positive)
    own[:, B:].fill_diagonal_(True)
    negative = ~positive & ~own
    hinge = (similar.unsqueeze(1) - similar.unsqueeze(2) + 5.0).relu()[positive.unsqueeze(2) & negative.unsqueeze(1)]
    assert_close(loss, hinge[hinge > 0].mean(), torch.float64)
    assert torch.autograd.grad(loss, second)[0].abs().max() > 0


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "maps"])
@pytest.mark.parametrize("ref_includes_query", [True, False])
def test_accuracies_are_those_of_the_score_matrix(ref_includes_query: bool, flat: bool) -> None:
    matcher = make_matcher()
    query, others = maps(B, 1, shape=(C, H, W)), maps(2 * B, 2, shape=(C, H, W))
    reference, labels = others, LABELS.repeat(2)
    if ref_includes_query:
        reference, labels = torch.cat([query, others]), LABELS.repeat(3)
    arguments = (query, LABELS, reference, labels, ref_includes_query)
    given = Given(matcher.match(query, reference))
    expected = AccuracyCalculator(METRICS, knn_func=CustomKNN(given), device=DEVICE).get_accuracy(*arguments)
    assert 0 < expected["mean_average_precision"] < 1
    if flat:
        arguments = (query.flatten(1), LABELS, reference.flatten(1), labels, ref_includes_query)
    calculator = AccuracyCalculator(METRICS, knn_func=QAConvKNN(matcher), device=DEVICE)
    assert calculator.get_accuracy(*arguments) == expected
    assert matcher.training
    fewer = QAConvKNN(matcher, prefilter=8)(query, 3, reference, ref_includes_query)
    every = QAConvKNN(matcher)(query, len(reference) - 1, reference, ref_includes_query)
    for row in range(B):  # those of the full search, less what the prefilter leaves out
        places = [every[1][row].tolist().index(item) for item in fewer[1][row].tolist()]
        assert places == sorted(places)
        assert_close(fewer[0][row], every[0][row, places], torch.float32)


@pytest.mark.parametrize("ref_includes_query", [True, False])
def test_cosine_search_finds_what_theirs_finds(ref_includes_query: bool) -> None:
    query = torch.randn(B, 16, device=DEVICE, dtype=torch.float64)
    reference = query if ref_includes_query else torch.randn(20, 16, device=DEVICE, dtype=torch.float64)
    similarities, indices = cosine_knn(query, 4, reference, ref_includes_query)
    theirs = CustomKNN(CosineSimilarity())(query, 4, reference, ref_includes_query)
    assert_close(similarities, theirs[0], torch.float64)
    assert torch.equal(indices, theirs[1])
    calculator = AccuracyCalculator(METRICS, knn_func=cosine_knn, device=DEVICE)
    expected = AccuracyCalculator(METRICS, knn_func=CustomKNN(CosineSimilarity()), device=DEVICE)
    assert calculator.get_accuracy(query, LABELS) == expected.get_accuracy(query, LABELS)


def test_bad_input_is_refused() -> None:
    with pytest.raises(TypeError, match="matcher: expected a QAConv, got Linear"):
        QAConvDistance(torch.nn.Linear(2, 2))
    distance = QAConvDistance(make_matcher(torch.float64))
    with pytest.raises(ValueError, match=r"\[B, C\*H\*W\], here \[B, 5, 2, 3\] or \[B, 30\], got shape \[4, 35\]"):
        distance(torch.randn(4, 35, device=DEVICE))
    with pytest.raises(ValueError, match=r"ref_emb: expected .*, got shape \[4, 5, 3, 2\]"):
        distance(maps(4, 1, shape=(C, H, W)), maps(4, 1, shape=(C, W, H)))
    references = maps(5, 1, shape=(C, H, W))
    with pytest.raises(ValueError, match=r"prefilter: expected at least 5, got 2: .*AccuracyCalculator without k"):
        QAConvKNN(make_matcher(), prefilter=2)(references, 4, references, ref_includes_query=True)
    with pytest.raises(TypeError, match="query_emb"):
        distance(maps(4, 1, shape=(C, H, W)).int())
    with pytest.raises(ValueError, match="as many references as queries, got 5 and 4"):
        distance.pairwise_distance(maps(4, 1, shape=(C, H, W)), maps(5, 1, shape=(C, H, W)))


@pytest.mark.parametrize(
    "make",
    [losses.CircleLoss, losses.PNPLoss, losses.AngularLoss, losses.FastAPLoss,
     miners.AngularMiner, miners.DistanceWeightedMiner],
)  # fmt: skip
def test_what_needs_another_distance_refuses_this_one(make: Make) -> None:
    """The list of docs/integrations.md."""
    with pytest.raises(AssertionError, match=r"distance"):
        make(distance=QAConvDistance(make_matcher()))
