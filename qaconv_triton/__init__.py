"""QAConv matching with graph sampling, on Triton kernels: every location of a map against every location of another.

    from qaconv_triton import QAConv, SoftmaxTripletLoss

Query-adaptive convolution: arXiv:1904.10424; graph sampling:
arXiv:2104.01546.
"""

import importlib.util
import sys
from pathlib import Path

from . import versions

versions.check_installed()  # first: what follows fails under an old torch, with less clear errors

_beside = Path(__file__).parents[1] / "kernels" / "__init__.py"
if not Path(__file__).with_name("kernels").is_dir() and _beside.is_file():  # a clone, installed or not
    _spec = importlib.util.spec_from_file_location(
        f"{__name__}.kernels", _beside, submodule_search_locations=[str(_beside.parent)]
    )
    assert _spec is not None
    assert _spec.loader is not None
    kernels = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(kernels)

from . import functional
from .checkpoint import convert_checkpoint
from .class_memory import ClassMemoryLoss
from .correspondences import Correspondences
from .losses import PairwiseMatchingLoss, SoftmaxTripletLoss, TripletLoss
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
