"""How an autograd function is applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def applying(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`, without what it does at every call for compilers and the transforms of torch.func alone.

    That inspects the signature of `forward`, which takes longer than the rest.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply
    plain: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return plain
