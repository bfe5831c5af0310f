"""Feature maps of a gallery in one safetensors file, written chunk by chunk and read memory-mapped.

The format is that of safetensors: the length of a JSON header in eight bytes, the header, the tensors. Any reader of it
can open the file; `pip install qaconv-triton[eval]` brings what this module needs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .reid import as_integers
from .sources import CPU, is_array, read_chunks, read_maps

if TYPE_CHECKING:
    from .reid import Integers
    from .sources import Maps

CONTENT = "qaconv_triton features, version 1"  # in the metadata
DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}
ROWS = 1024  # of a tensor that are written at a time
ROUNDING = 1e-5  # how far a resize may leave visibility outside [0, 1]
MAP_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Features(NamedTuple):
    """Feature maps of pictures, and what they show.

    Attributes:
        maps: `[M, C, H, W]`, memory-mapped: rows are read from the file when they are used.
        ids: identities int64 `[M]`.
        cameras: int64 `[M]`, or None.
        occ: visibility `[M, 1, H, W]`, memory-mapped, or None.
        paths: of the M pictures, or None.

    Examples:
        >>> Features(torch.ones(2, 8, 4, 2), torch.tensor([5, 6]), None, None, ["a.jpg", "b.jpg"]).ids.tolist()
        [5, 6]
    """

    maps: Tensor
    ids: Tensor
    cameras: Tensor | None
    occ: Tensor | None
    paths: list[str] | None


def save_features(
    path: str | os.PathLike[str],
    maps: Maps,
    ids: Integers,
    cameras: Integers | None = None,
    *,
    occ: Maps | None = None,
    paths: Iterable[str | os.PathLike[str]] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write feature maps with identities and cameras to one safetensors file, chunk by chunk.

    The file gets its name when it is whole: what is interrupted leaves the file that was there before, or none.

    Args:
        path: of the file, in UTF-8, as safetensors needs it.
        maps: `[M, C, H, W]`, M that of `ids`, float16, bfloat16, float32 or float64: a tensor, a NumPy array, or an
            iterable of chunks `[m, C, H, W]`, which is never held whole.
        ids: identities `[M]`, integers: a tensor, a list or an array.
        cameras: cameras `[M]`, integers.
        occ: visibility `[M, 1, H, W]` or `[M, H, W]` in [0, 1], to which rounding errors of 1e-5 are clamped: as an
            array, or in chunks, which are then of the same sizes as those of maps.
        paths: of the M pictures.
        dtype: torch.float16, torch.bfloat16 or torch.float32, that maps and visibility are written in.

    Raises:
        TypeError: arguments of another type or dtype.
        OSError: the file cannot be written: a folder, or in none; raised before a chunk is read.
        ValueError: shapes that do not fit, another number of maps than of identities, NaN or Inf, visibility outside
            [0, 1], a map that `dtype` cannot hold: a number above its range, or all of them so small that zeros are
            left; a NUL in one of `paths`.

    Examples:
        >>> from qaconv_triton.evaluation import load_features, save_features
        >>> save_features("gallery.safetensors", (torch.rand(2, 8, 4, 2) for _ in range(3)), ids=[5, 5, 6, 6, 7, 7])
        >>> load_features("gallery.safetensors").maps.shape
        torch.Size([6, 8, 4, 2])
    """
    if dtype not in MAP_DTYPES:
        raise TypeError(f"dtype: expected torch.float16, torch.bfloat16 or torch.float32, got {dtype}")
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{os.fspath(path)!r}: expected a path in UTF-8, as readers of safetensors need it") from error
    tensors = {"ids": as_integers(ids, "ids", CPU)}
    count = len(tensors["ids"])
    if cameras is not None:
        tensors["cameras"] = as_integers(cameras, "cameras", CPU, count, "ids")
    if paths is not None:
        data = bytearray(b"".join(os.fsencode(text) + b"\0" for text in as_texts(paths, "paths", count)))
        tensors["paths"] = (
            torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8, device=CPU)
        )
    names = "maps", "occ"
    chunks = [read_maps({}, maps, occ, *names)] if is_array(maps) else read_chunks({}, maps, occ, *names)
    done, offsets = 0, None
    with whole_file(path) as part, part.open("wb") as file:
        for chunk in chunks:
            if done + len(chunk) > count:
                raise ValueError(f"maps: expected {count}, as there are ids, got {done + len(chunk)} or more")
            if offsets is None:
                shapes = {"maps": (count, *chunk.maps.shape[1:])}
                if occ is not None:
                    shapes["occ"] = (count, 1, *chunk.maps.shape[2:])
                offsets = _write_header(file, tensors, shapes, dtype)
            for start in range(0, len(chunk), ROWS):
                values, visibility = chunk.rows(slice(start, start + ROWS), CPU)
                for name, rows in (("maps", values), ("occ", visibility)):
                    if rows is not None:
                        rows = _narrowed(rows, dtype, done, name)
                        _write(file, offsets[name] + done * rows[:1].nbytes, rows)
                done += len(values)
        if done != count:
            raise ValueError(f"maps: expected {count}, as there are ids, got {done}")
        if offsets is None:
            raise ValueError("maps: expected a chunk at least, which may be of no maps: its shape is saved; got none")
        file.flush()
        os.fsync(file.fileno())


def load_features(path: str | os.PathLike[str]) -> Features:
    """Open a file of `save_features`: the maps stay in it and are read when they are used.

    Args:
        path: of the file, which must not change as long as the maps are in use.

    Returns:
        `Features`, on the CPU, maps and visibility in the dtype of the file.

    Raises:
        ImportError: safetensors is not installed.
        OSError: no such file.
        ValueError: a truncated, damaged or foreign file.

    Examples:
        >>> from qaconv_triton.evaluation import load_features, save_features
        >>> save_features("query.safetensors", torch.rand(2, 8, 4, 2), ids=[5, 6], cameras=[1, 2])
        >>> features = load_features("query.safetensors")
        >>> features.maps.dtype, features.cameras.tolist()
        (torch.float16, [1, 2])
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("load_features needs safetensors: pip install qaconv-triton[eval]") from error
    path = Path(path)
    with path.open("rb"):  # raises what is usual where there is no such file
        pass
    try:
        with torch.device("cpu"), safe_open(path, framework="pt") as file:  # old versions heed torch's default device
            content = (file.metadata() or {}).get("content")
            tensors = {name: file.get_tensor(name) for name in file.keys()} if content == CONTENT else {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated, or not a safetensors file ({error})") from error
    if content != CONTENT:
        raise ValueError(f"{path}: not a file of save_features: expected the content {CONTENT!r}, got {content!r}")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    count, *sizes = shapes.get("maps", [0])
    expected = {"maps": [count, *sizes], "ids": [count], "cameras": [count], "occ": [count, 1, *sizes[1:]]}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    kinds = {"maps": MAP_DTYPES, "occ": MAP_DTYPES, "paths": (torch.uint8,)}
    kinds |= {"ids": (torch.int64,), "cameras": (torch.int64,)}
    has_kinds = all(kind in kinds.get(name, (kind,)) for name, kind in dtypes.items())
    texts = tensors["paths"].numpy().tobytes().split(b"\0")[:-1] if has_kinds and "paths" in shapes else None
    if (
        not has_kinds
        or len(sizes) != 3
        or "ids" not in shapes
        or any(shapes.get(name, shape) != shape for name, shape in expected.items())
        or (texts is not None and len(texts) != count)
    ):
        raise ValueError(f"{path}: damaged: its tensors do not fit each other: {shapes}, {dtypes}")
    paths = None if texts is None else [os.fsdecode(text) for text in texts]
    return Features(tensors["maps"], tensors["ids"], tensors.get("cameras"), tensors.get("occ"), paths)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a file that gets the name `path` when it is whole; a failure leaves what was there.

    Raises:
        OSError: `path` is a folder, or in none that can be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected the path of a file, got a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {str(path.parent)!r}")
    with TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:  # whose name no other thread has
        part = Path(folder, "part")
        yield part
        part.replace(path)


def as_texts(paths: Iterable[str | os.PathLike[str]], name: str, count: int) -> list[str]:
    """Paths as strings.

    Raises:
        TypeError: something else than paths.
        ValueError: another number than `count`, a NUL in a path.
    """
    if isinstance(paths, str | bytes) or not isinstance(paths, Iterable):
        raise TypeError(f"{name}: expected {count} paths, got the single {paths!r}")
    try:
        texts = [os.fsdecode(path) for path in paths]
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    if len(texts) != count:
        raise ValueError(f"{name}: expected {count}, as there are ids, got {len(texts)}")
    if wrong := [text for text in texts if "\0" in text]:
        raise ValueError(f"{name}: no path has a NUL, got {wrong[0]!r}")
    return texts


def _write_header(
    file: BinaryIO, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, int]:
    """Write the header and `tensors`; return where in the file those of `shapes`, in `dtype`, are to be written."""
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    kinds |= {name: (dtype, shape) for name, shape in shapes.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt", "content": CONTENT}}
    ends = {}
    end = 0
    for name, (kind, shape) in sorted(kinds.items(), key=lambda item: -item[1][0].itemsize):  # each aligned
        start, end = end, end + prod(shape) * kind.itemsize
        header[name] = {"dtype": DTYPES[kind], "shape": shape, "data_offsets": [start, end]}
        ends[name] = start
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    offsets = {name: 8 + len(text) + start for name, start in ends.items()}
    file.truncate(8 + len(text) + end)
    for name, tensor in tensors.items():
        _write(file, offsets[name], tensor)
    return offsets


def _write(file: BinaryIO, offset: int, tensor: Tensor) -> None:
    file.seek(offset)
    file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _narrowed(values: Tensor, dtype: torch.dtype, first: int, name: str) -> Tensor:
    """Values `[m, ...]` in `dtype`, if they are finite and it can hold them: rows `first` and on, for the message."""
    values = values.detach().flatten(1)
    narrow = (values.clamp(0, 1) if name == "occ" else values).to(dtype)
    largest = values.abs().amax(dim=1)
    is_wrong = ~narrow.isfinite().all(dim=1)
    if name != "occ":  # visibility that is rounded to zeros is what it says: hidden
        is_wrong |= (largest > 0) & (narrow == 0).all(dim=1)
    if bool(is_wrong.any()):
        row = int(is_wrong.nonzero()[0])
        if count := int((~values[row].isfinite()).sum()):
            got = f"{count} of its {values.shape[1]} numbers are NaN or Inf before the conversion to {dtype}"
            raise ValueError(f"{name}: expected finite numbers, got row {first + row}: {got}")
        limits = torch.finfo(dtype)
        raise ValueError(
            f"{name}: {dtype} cannot hold row {first + row}, whose largest magnitude is {largest[row]:.3g}: "
            f"its numbers are from {limits.tiny * limits.eps:.3g} to {limits.max:.3g}; scale the maps, or pass "
            "another dtype"
        )
    if name == "occ" and bool((is_outside := ((values < -ROUNDING) | (values > 1 + ROUNDING))).any()):
        row, place = is_outside.nonzero()[0].tolist()
        raise ValueError(f"occ: expected visibility in [0, 1], got {values[row, place]:.9g} in row {first + row}")
    return narrow
