"""Dtypes that follow from those of the inputs."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def argmax_dtype(locations: int) -> torch.dtype:
    """The smallest dtype that holds a location."""
    if locations <= 256:
        return torch.uint8
    return torch.int16 if locations <= 2**15 else torch.int32
