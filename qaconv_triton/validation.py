"""Input checks shared by the modules: every error restates what came in, and nothing has changed when it is raised."""

from __future__ import annotations

import math
import numbers
import operator
import os
import reprlib
from typing import SupportsIndex

import torch
from torch import Tensor
from torch.autograd import forward_ad

MAP_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHECKS_VARIABLE = "QACONV_TRITON_CHECKS"


def values_may_be_read(tensor: Tensor) -> bool:
    """Whether looking at values costs no stall: CPU tensors, or CUDA ones when the user asked for checks.

    Raises:
        ValueError: `QACONV_TRITON_CHECKS` is neither empty, "0" nor "1".
    """
    if torch.compiler.is_compiling():
        return False
    wanted = os.environ.get(CHECKS_VARIABLE, "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"{CHECKS_VARIABLE}: expected '0' or '1', got {wanted!r}")
    return tensor.device.type == "cpu" or wanted == "1"


def check_layout(tensor: Tensor, name: str) -> None:
    """Require a dense tensor: neither sparse nor nested.

    Raises:
        TypeError: another layout.
    """
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


def refuse_tangent(tensor: Tensor, name: str) -> None:
    """Refuse a dual tensor of forward-mode differentiation, which nothing here computes.

    Raises:
        RuntimeError: `tensor` has a tangent.
    """
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise RuntimeError(f"{name} has a forward-mode tangent, but only reverse-mode derivatives are implemented")


def check_maps(
    maps: Tensor,
    name: str,
    *,
    channels: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> None:
    """Require `maps` to be real floating-point feature maps `[B, C, H, W]`, of the given `C`, `H`, `W` where given.

    Raises:
        TypeError: not a tensor, or not float16/bfloat16/float32/float64.
        ValueError: not 4-D, or `C, H, W` other than expected.
    """
    if not isinstance(maps, Tensor):
        raise TypeError(f"{name}: expected a tensor [B, C, H, W], got {type(maps).__name__}")
    check_layout(maps, name)
    shape, wanted = maps.shape[1:], (channels, height, width)
    if (
        maps.dim() != 4
        or 0 in shape
        or (shape != wanted and any(size not in (None, got) for size, got in zip(wanted, shape, strict=True)))
    ):
        letters = zip("BCHW", (None, *wanted), strict=True)
        expected = ", ".join(letter if size is None else str(size) for letter, size in letters)
        raise ValueError(f"{name}: expected feature maps [{expected}], got shape {list(maps.shape)}")
    if maps.dtype not in MAP_DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {maps.dtype}")


def check_device(tensor: Tensor, name: str, device: torch.device, owner: str) -> None:
    """Require `tensor` on `device`, where `owner` (for the message) lives.

    Raises:
        ValueError: another device.
    """
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but {owner} is on {device}")


def check_visibility(visibility: Tensor, name: str, maps: Tensor) -> None:
    """Require a visibility map `[B, 1, H, W]` (or `[B, H, W]`) for `maps [B, C, H, W]`, on their device.

    Raises:
        TypeError: not a real floating-point tensor.
        ValueError: another shape or device.
    """
    batch, _, height, width = maps.shape
    if not isinstance(visibility, Tensor):
        raise TypeError(f"{name}: expected a tensor [{batch}, 1, {height}, {width}], got {type(visibility).__name__}")
    check_layout(visibility, name)
    if tuple(visibility.shape) not in ((batch, 1, height, width), (batch, height, width)):
        raise ValueError(
            f"{name}: expected shape [{batch}, 1, {height}, {width}] for feature maps {list(maps.shape)}, "
            f"got {list(visibility.shape)}"
        )
    if not visibility.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {visibility.dtype}")
    check_device(visibility, name, maps.device, "the feature maps")


def check_labels(labels: Tensor, batch: int, num_classes: int | None, device: torch.device) -> Tensor:
    """Return `labels` as int64 after requiring `batch` integer class ids in `[0, num_classes)`, on `device`.

    The range is checked where that does not stall a stream: on the CPU, or anywhere with `QACONV_TRITON_CHECKS=1`.

    Raises:
        TypeError: not an integer tensor.
        ValueError: not of shape `[batch]`, or on another device.
        IndexError: a label outside `[0, num_classes)`.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected an integer tensor [{batch}], got {type(labels).__name__}")
    check_layout(labels, "labels")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected an integer dtype, got {labels.dtype}")
    if tuple(labels.shape) != (batch,):
        raise ValueError(f"labels: expected shape [{batch}], one per sample, got {list(labels.shape)}")
    check_device(labels, "labels", device, "the features")
    labels = labels.long()
    if num_classes is not None and values_may_be_read(labels):
        check_index(labels, num_classes, "labels", "classes")
    return labels


def check_index(index: Tensor, size: int, name: str, items: str) -> None:
    """Require every value of `index` in `[0, size)`.

    Raises:
        IndexError: naming the first values that are not.
    """
    if index.is_meta:  # shapes alone
        return
    outside = (index < 0) | (index >= size)
    if bool(outside.any()):
        first = index[outside][:5].tolist()
        raise IndexError(f"{name}: expected values in [0, {size}) for {size} {items}, got {first}")


def check_count(value: SupportsIndex, name: str, *, low: int, high: int | None, why: str) -> int:
    """Return an integer, such as an int or a NumPy one, as an int after requiring it in `[low, high]`.

    `why` says where the bound comes from.

    Raises:
        TypeError: not an integer; a bool is none.
        ValueError: outside the range.
    """
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
    try:
        number = None if is_bool else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if number < low or (high is not None and number > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {bound} ({why}), got {number}")
    return number


def check_flag(value: bool, name: str) -> None:
    """Require a bool.

    Raises:
        TypeError: anything else, a number included.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_number(value: object, name: str, *, why: str) -> float:
    """Require a finite number, 0 or above, and return it as a float; `why` says what it is.

    Raises:
        TypeError: not a number: NumPy's are, tensors, strings and bools are not.
        ValueError: negative, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number ({why}), got {type(value).__name__} {reprlib.repr(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and at least 0 ({why}), got {reprlib.repr(value)}")
    return number


def check_finite_rows(table: Tensor, name: str, first: int = 0) -> None:
    """Require every row of `table [N, ...]`, classes from `first` on, to be finite, without a copy of the table.

    Raises:
        ValueError: naming the first classes with NaN or Inf.
    """
    if table.shape[0] == 0:
        return
    every_other = tuple(range(1, table.dim()))
    finite = torch.maximum(table.amax(every_other), -table.amin(every_other)) < torch.inf
    if not finite.all():
        broken = finite.logical_not().nonzero().flatten()
        ids = (first + broken[:5]).tolist()
        raise ValueError(f"{name} holds NaN or Inf in {broken.numel()} of {table.shape[0]} classes, first: {ids}")
