"""Evaluation at gallery scale: rankings, metrics of re-identification and verification, re-ranking, stored features.

from qaconv_triton.evaluation import load_features, rank_gallery, reid_metrics
"""

from .feature_store import Features, load_features, save_features
from .ranking import rank_gallery
from .reid import QueryMetrics, ReIDMetrics, average_queries, query_metrics, reid_metrics
from .rerank import k_reciprocal_rerank
from .verification import VerificationMetrics, verification_metrics

__all__ = [
    "Features",
    "QueryMetrics",
    "ReIDMetrics",
    "VerificationMetrics",
    "average_queries",
    "k_reciprocal_rerank",
    "load_features",
    "query_metrics",
    "rank_gallery",
    "reid_metrics",
    "save_features",
    "verification_metrics",
]
