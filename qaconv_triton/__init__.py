"""QAConv matching with graph sampling, on Triton kernels: every location of a map against every location of another.

    from qaconv_triton import QAConv, SoftmaxTripletLoss

Query-adaptive convolution: arXiv:1904.10424; graph sampling:
arXiv:2104.01546.
"""

import os

from . import versions

if not os.path.isdir(os.path.join(__path__[0], "kernels")):  # a clone: they lie beside the package
    __path__.append(os.path.dirname(__path__[0]))
versions.check_installed()  # first: what follows fails under an old torch, with less clear errors

from . import functional
from .checkpoint import convert_checkpoint
from .correspondences import Correspondences
from .losses import ClassMemoryLoss, PairwiseMatchingLoss, SoftmaxTripletLoss, TripletLoss
from .matcher import QAConv
from .sample_graph import sample_class_graph
from .sampler import GraphSampler
from .scores import ClassScores

__all__ = [
    "ClassMemoryLoss",
    "ClassScores",
    "Correspondences",
    "GraphSampler",
    "PairwiseMatchingLoss",
    "QAConv",
    "SoftmaxTripletLoss",
    "TripletLoss",
    "convert_checkpoint",
    "functional",
    "sample_class_graph",
]
__version__ = "0.1.0"
