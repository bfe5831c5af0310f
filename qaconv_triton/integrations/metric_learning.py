"""pytorch-metric-learning: matching scores in its losses and miners, and searches for its `AccuracyCalculator`
(`pip install qaconv-triton[metric-learning]`).
"""

from __future__ import annotations

from typing import SupportsIndex

import torch
from torch import Tensor

from ..evaluation import rank_gallery
from ..functional import topk_cosine
from ..head import BatchStatistics, update_running_statistics
from ..matcher import QAConv
from ..scores import prepared_pairs, score_gallery, score_maps
from ..validation import check_count

try:
    from pytorch_metric_learning.distances import BaseDistance
    from pytorch_metric_learning.utils.inference import return_results
except ImportError as error:
    package = "pytorch-metric-learning: pip install qaconv-triton[metric-learning]"
    raise ImportError(f"qaconv_triton.integrations.metric_learning needs {package}") from error


class QAConvDistance(BaseDistance):  # type: ignore[misc]
    """Matching scores of feature maps as a similarity: larger is more similar (`is_inverted` is True).

    Embeddings are maps `[B, C, H, W]`, or the same flattened to `[B, C*H*W]`, as `CrossBatchMemory` keeps them. The
    matcher's parameters are this module's, and those of the loss that holds it: give them to the optimizer.

    `normalize_embeddings` is False, `p` 2 and `power` 1, and cannot be set: the matcher normalises every location of a
    map itself, so that a factor changes no score, and powers of scores, which may be negative, are not ordered as they
    are. In training mode the norms take the statistics of the pairs of the call. Their running statistics are updated
    by calls with gradients only: a miner looks at the scores that the loss sees, and does not count twice.

    Args:
        matcher: a `QAConv`; its class table, if it has one, is not used.

    Raises:
        TypeError: another matcher.

    Examples:
        >>> from pytorch_metric_learning.losses import TripletMarginLoss
        >>> criterion = TripletMarginLoss(margin=1.0, distance=QAConvDistance(QAConv(8, 2, 3)))
        >>> maps, labels = torch.randn(6, 8, 2, 3, requires_grad=True), torch.tensor([0, 0, 1, 1, 2, 2])
        >>> criterion(maps, labels).backward()
    """

    def __init__(self, matcher: QAConv) -> None:
        if not isinstance(matcher, QAConv):
            raise TypeError(f"matcher: expected a QAConv, got {type(matcher).__name__}")
        super().__init__(normalize_embeddings=False, is_inverted=True)
        self.matcher = matcher

    def check_shapes(self, query_emb: Tensor, ref_emb: Tensor | None) -> None:
        """Require maps of the matcher's size, flattened or not.

        Raises:
            TypeError, ValueError: as for `QAConv.forward`.
        """
        self._maps(query_emb, "query_emb")
        if ref_emb is not None:
            self._maps(ref_emb, "ref_emb")

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor | None) -> Tensor:
        """Score every query against every reference.

        Args:
            query_emb: `[B, C, H, W]` or `[B, C*H*W]`.
            ref_emb: the same of R references; None for the queries themselves.

        Returns:
            `[B, R]`, fp32 (fp64 for fp64), with gradients where they are enabled.

        Raises:
            TypeError, ValueError: as for `QAConv.forward`.
        """
        query = self._maps(query_emb, "query_emb")
        reference = query if ref_emb is None or ref_emb is query_emb else self._maps(ref_emb, "ref_emb")
        scores, statistics = score_gallery(self.matcher._head, query, reference, None, None, evaluate=False)
        return _counted(scores, statistics)

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """Score query i against reference i: `[B]`, as `MatchFinder` asks for.

        In training mode the norms take the statistics of these B pairs, so that it is no diagonal of `compute_mat`; in
        eval mode it is.

        Raises:
            TypeError, ValueError: as for `QAConv.forward`; also when there are not as many references as queries.
        """
        query, reference = self._maps(query_emb, "query_emb"), self._maps(ref_emb, "ref_emb")
        if query.shape[0] != reference.shape[0]:
            raise ValueError(f"pairs need as many references as queries, got {len(reference)} and {len(query)}")
        ((probe, gallery, index),) = prepared_pairs(query, reference, None, None, step=max(len(query), 1))
        return _counted(*score_maps(self.matcher._head, probe, gallery, index)).squeeze(1)

    def _maps(self, embeddings: Tensor, name: str) -> Tensor:
        """Embeddings as `[B, C, H, W]`, checked."""
        shape = torch.Size((self.matcher.num_features, self.matcher.height, self.matcher.width))
        if isinstance(embeddings, Tensor) and embeddings.dim() == 2:
            if embeddings.shape[1] != shape.numel():
                expected = f"[B, C, H, W] or [B, C*H*W], here [B, {str(list(shape))[1:-1]}] or [B, {shape.numel()}]"
                raise ValueError(f"{name}: expected feature maps {expected}, got shape {list(embeddings.shape)}")
            embeddings = embeddings.unflatten(1, shape)
        self.matcher._check_maps(embeddings, None, name, "")
        return embeddings


def _counted(scores: Tensor, statistics: list[BatchStatistics]) -> Tensor:
    if torch.is_grad_enabled():
        update_running_statistics(statistics)
    return scores


class QAConvKNN:
    """The references of largest matching score, as `knn_func` of an `AccuracyCalculator`.

    Args:
        matcher: a `QAConv`, on the calculator's device; it scores in eval mode.
        prefilter: score only so many references of each query, the nearest by cosine, as `evaluation.rank_gallery`. The
            calculator needs a `k` then, below the prefilter: without one it asks for all references.

    Raises:
        TypeError, ValueError: another matcher, a prefilter that is no positive integer.

    Examples:
        >>> from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
        >>> matcher, maps, labels = QAConv(8, 2, 3), torch.randn(6, 8, 2, 3), torch.tensor([0, 0, 1, 1, 2, 2])
        >>> search = AccuracyCalculator(include=("precision_at_1",), knn_func=QAConvKNN(matcher), device=maps.device)
        >>> sorted(search.get_accuracy(maps, labels))
        ['precision_at_1']
    """

    def __init__(self, matcher: QAConv, prefilter: SupportsIndex | None = None) -> None:
        self.distance = QAConvDistance(matcher)
        if prefilter is not None:
            prefilter = check_count(prefilter, "prefilter", low=1, high=None, why="references of each query")
        self.prefilter = prefilter

    def __call__(
        self, query: Tensor, k: int, reference: Tensor, ref_includes_query: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Search the k best references of every query.

        Args:
            query: `[B, C, H, W]` or `[B, C*H*W]`.
            k: references per query.
            reference: the same of R references.
            ref_includes_query: leave reference i out for query i.

        Returns:
            Scores `[B, k]`, falling, and indices `[B, k]`.

        Raises:
            TypeError, ValueError: as for `evaluation.rank_gallery`.
        """
        query, reference = self.distance._maps(query, "query"), self.distance._maps(reference, "reference")
        k, matcher = k + ref_includes_query, self.distance.matcher
        if self.prefilter is not None and k > self.prefilter:
            reason = f"the search is asked for the {k} best, and an AccuracyCalculator without k asks for all"
            raise ValueError(
                f"prefilter: expected at least {k}, got {self.prefilter}: {reason}; give it a k below {self.prefilter}"
            )
        scores, indices = rank_gallery(matcher, query, reference, k, prefilter=self.prefilter)
        found: tuple[Tensor, Tensor] = return_results(scores, indices, ref_includes_query)
        return found


def cosine_knn(query: Tensor, k: int, reference: Tensor, ref_includes_query: bool = False) -> tuple[Tensor, Tensor]:
    """Search the references of largest cosine similarity, as `knn_func` of an `AccuracyCalculator`, without FAISS.

    Args:
        query: `[B, D]`, or `[B, C, H, W]`, which is flattened.
        k: references per query.
        reference: the same of R references.
        ref_includes_query: leave reference i out for query i.

    Returns:
        Similarities `[B, k]`, falling, and indices `[B, k]`.

    Raises:
        TypeError, ValueError: as for `functional.topk_cosine`.

    Examples:
        >>> cosine_knn(torch.eye(3), 1, torch.tensor([[1.0, 0, 0], [1, 1, 0]]))[1].flatten().tolist()
        [0, 1, 0]
    """
    found: tuple[Tensor, Tensor] = return_results(
        *topk_cosine(query, reference, k + ref_includes_query), ref_includes_query
    )
    return found
