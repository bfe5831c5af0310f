"""Feature maps wherever they lie: tensors and NumPy arrays, in memory or memory-mapped, and iterables of chunks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..validation import check_layout, check_maps, check_visibility

if TYPE_CHECKING:
    import numpy as np

    Array = Tensor | np.ndarray[Any, Any]
    Maps = Array | Iterable[Array]

Sizes = dict[str, int]  # channels, height and width that maps must have; empty where any will do
CPU = torch.device("cpu")
JOINED = 1024  # maps of small chunks that are joined to one


@dataclass(frozen=True, eq=False)
class Held:
    """Maps `[M, C, H, W]` and their visibility, wherever they lie."""

    maps: Array
    visibility: Array | None

    def __len__(self) -> int:
        return len(self.maps)

    def rows(self, rows: slice | Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Some of them `[m, C, H, W]`, and their visibility `[m, 1, H, W]`, on `device`."""
        maps = take(self.maps, rows, device)
        if self.visibility is None:
            return maps, None
        return maps, take(self.visibility, rows, device).reshape(len(maps), 1, *maps.shape[2:])


def take(values: Array, rows: slice | Tensor, device: torch.device) -> Tensor:
    """Some rows of an array, as a tensor on `device`."""
    if isinstance(values, Tensor):
        return values[rows if isinstance(rows, slice) else rows.to(values.device)].to(device)
    return _copied(values[rows if isinstance(rows, slice) else rows.cpu().numpy()]).to(device)


def _copied(array: np.ndarray[Any, Any]) -> Tensor:
    """A copy, as the array may be read-only, in the byte order of this machine."""
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def as_tensor(values: Any, name: str, expected: str, hint_for_names: str = "") -> Tensor:
    """A tensor as it is; an array or a list, whose floating-point numbers are float64, as a tensor on the CPU.

    Raises:
        TypeError: something else, or of something else than numbers; `hint_for_names` is added where these are strings.
    """
    try:
        if is_array(values):
            tensor = values if isinstance(values, Tensor) else _copied(values)
        else:
            tensor = torch.as_tensor(values, device=CPU)
            if tensor.is_floating_point():
                tensor = torch.as_tensor(values, device=CPU, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        has_names = isinstance(values, Iterable) and any(isinstance(value, str) for value in values)
        got = f"{type(values).__name__} ({error}){hint_for_names * has_names}"
        raise TypeError(f"{name}: expected {expected}, got {got}") from error
    check_layout(tensor, name)
    return tensor


def is_array(values: object) -> bool:
    """Whether `values` is a tensor or a NumPy array, not an iterable of them."""
    numpy = sys.modules.get("numpy")  # without it nobody has an array
    return isinstance(values, Tensor) or (numpy is not None and isinstance(values, numpy.ndarray))


def describe(values: Array, name: str) -> Tensor:
    """Shape and dtype of an array, as a tensor without values."""
    if isinstance(values, Tensor):
        check_layout(values, name)
        if values.is_meta:
            raise ValueError(f"{name}: no values on the meta device")
        return values.detach().to("meta")
    try:
        dtype = torch.from_numpy(sys.modules["numpy"].empty(0, values.dtype.newbyteorder("="))).dtype
    except TypeError as error:
        raise TypeError(f"{name}: expected floating-point numbers, got an array of {values.dtype}") from error
    return torch.empty(values.shape, dtype=dtype, device="meta")


def _checked(sizes: Sizes, maps: Any, visibility: Any, name: str, visibility_name: str) -> Held:
    """An array of maps of these sizes with its visibility, after checks.

    Raises:
        TypeError, ValueError: another type, dtype or shape.
    """
    if not is_array(maps):
        raise TypeError(f"{name}: expected a tensor or a NumPy array [M, C, H, W], got {type(maps).__name__}")
    described = describe(maps, name)
    check_maps(described, name, **sizes)
    if visibility is not None:
        if not is_array(visibility):
            raise TypeError(f"{visibility_name}: expected a tensor or a NumPy array, got {type(visibility).__name__}")
        check_visibility(describe(visibility, visibility_name), visibility_name, described)
    return Held(maps, visibility)


def read_chunks(sizes: Sizes, maps: Any, visibility: Any, name: str, visibility_name: str) -> Iterator[Held]:
    """The chunks of an iterable, each with its visibility, which comes in such chunks or as one array."""
    check_iterable(maps, name, visibility_name)
    if visibility is not None:
        check_iterable(visibility, visibility_name, visibility_name)
    parts = iter(visibility) if visibility is not None and not is_array(visibility) else None
    count = number = 0
    for number, chunk in enumerate(maps, start=1):
        label, visibility_label = f"{name}, chunk {number}", f"{visibility_name}, chunk {number}"
        described = _checked(sizes, chunk, None, label, "").maps
        sizes = dict(zip(("channels", "height", "width"), described.shape[1:], strict=True))
        part = visibility[count : count + len(chunk)] if parts is None and visibility is not None else None
        if parts is not None and (part := next(parts, None)) is None:
            raise ValueError(f"{visibility_name}: expected a chunk for each of {name}, got {number - 1}")
        yield _checked(sizes, chunk, part, label, visibility_label)
        count += len(chunk)
    if parts is not None and next(parts, None) is not None:
        raise ValueError(f"{visibility_name}: expected a chunk for each of {number} of {name}, got more")
    if parts is None and visibility is not None and len(visibility) != count:
        raise ValueError(f"{visibility_name}: expected {count} maps, as {name} has, got shape {list(visibility.shape)}")


def read_maps(sizes: Sizes, maps: Any, visibility: Any, name: str, visibility_name: str) -> Held:
    """An array with its visibility, or an iterable, read into memory."""
    if not is_array(maps):
        parts = list(in_blocks(read_chunks(sizes, maps, visibility, name, visibility_name), JOINED, CPU))
        if not parts:
            return Held(torch.empty(0, *sizes.values(), device=CPU, dtype=torch.float32), None)
        return Held(*_joined(parts))
    if visibility is not None and not is_array(visibility):
        described = _checked(sizes, maps, None, name, "").maps
        visibility = _read_visibility(visibility, described, visibility_name)
    return _checked(sizes, maps, visibility, name, visibility_name)


def check_iterable(values: object, name: str, visibility_name: str) -> None:
    """Require an iterable that is not `Features`, a tuple; `visibility_name` is the argument for their visibility.

    Raises:
        TypeError: anything else.
    """
    is_features = hasattr(values, "maps") and hasattr(values, "occ")
    if is_features or not isinstance(values, Iterable):
        hint = ": pass its .maps" + f", and its .occ as {visibility_name}" * bool(visibility_name)
        got = f"{type(values).__name__}{hint * is_features}"
        raise TypeError(f"{name}: expected a tensor, a NumPy array or an iterable of them, got {got}")


def _read_visibility(chunks: Iterable[Array], maps: Array, name: str) -> Tensor:
    check_iterable(chunks, name, name)
    parts = []
    for number, part in enumerate(chunks, start=1):
        label = f"{name}, chunk {number}"
        if not is_array(part):
            raise TypeError(f"{label}: expected a tensor or a NumPy array, got {type(part).__name__}")
        shape = (part.shape[0] if part.ndim else 0, 1, *maps.shape[2:])
        check_visibility(describe(part, label), label, torch.empty(shape, device="meta"))
        parts.append(take(part, slice(None), CPU).reshape(shape))
    return torch.cat(parts) if parts else torch.empty(0, 1, *maps.shape[2:], device=CPU, dtype=torch.float32)


def in_blocks(chunks: Iterable[Held], size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Chunks split or joined to about `size` maps on `device`, with their visibility; one block if all are empty."""
    pending: list[tuple[Tensor, Tensor | None]] = []
    for chunk in chunks:
        for start in range(0, max(len(chunk), 1), size):
            pending.append(chunk.rows(slice(start, start + size), device))
            if sum(len(maps) for maps, _ in pending) >= size:
                yield _joined(pending)
                pending = []
    if pending:
        yield _joined(pending)


def _joined(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    if len(parts) == 1:
        return parts[0]
    visibility = [part for _, part in parts if part is not None]
    return torch.cat([maps for maps, _ in parts]), torch.cat(visibility) if visibility else None
