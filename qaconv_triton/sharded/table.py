"""The sharded class table: a DTensor, Shard(0), that is made shard by shard and never whole anywhere.

Rows are dealt as `torch.chunk` deals them, the rule of DTensor: ceil(N / W) to each rank, fewer to the last ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

BLOCK = 256  # classes whose initial values are drawn together, from one seed
GATHERED_BYTES = 2**26  # of a piece that is gathered from all ranks, and of what is made of it


def check_mesh(mesh: object, num_classes: int | None, sparse_grad: bool, device: torch.device | str | None) -> None:
    """Require a one-dimensional mesh of this rank's, and a table that can be sharded over it.

    Raises:
        TypeError: not a `DeviceMesh`.
        ValueError: more dimensions, a mesh without this rank, no class table, sparse gradients, another device type.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a torch.distributed.DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, got {mesh.ndim}; slice a larger mesh by name, mesh['name']")
    if mesh.get_coordinate() is None:
        raise ValueError(f"mesh: rank {distributed.get_rank()} is not in {mesh}")
    if num_classes is None:
        raise ValueError("mesh: there is no class table to shard; pass num_classes as well")
    if sparse_grad:
        raise ValueError("mesh: the gradient of a sharded class table is dense; sparse_grad=True needs a whole one")
    if device is not None and torch.device(device).type != mesh.device_type:
        raise ValueError(f"device: the mesh is of {mesh.device_type} devices, got {str(device)!r}")


def device_of(mesh: DeviceMesh) -> torch.device:
    """This rank's device: the current one of the mesh's type."""
    return torch.empty(0, device=mesh.device_type).device


def rows_of(num_rows: int, mesh: DeviceMesh, rank: int | None = None) -> slice:
    """The rows, of `num_rows`, that a rank of the mesh has; this rank where None."""
    rank = mesh.get_local_rank() if rank is None else rank
    chunk = chunk_rows(num_rows, mesh)
    return slice(min(rank * chunk, num_rows), min((rank + 1) * chunk, num_rows))


def chunk_rows(num_rows: int, mesh: DeviceMesh) -> int:
    """The rows of the first rank; no other has more."""
    return -(-num_rows // mesh.size())


def rows_at(ids: DTensor, places: Tensor) -> Tensor:
    """The rows of sharded `ids [N, K]` at `places [P]`, int64 `[P, K]`; -1 for a place outside. Ranks call together."""
    mesh, local = ids.device_mesh, ids.to_local()
    rows = rows_of(ids.shape[0], mesh)
    found = places.new_full((len(places), ids.shape[1]), -1)
    if len(local):
        is_own = (places >= rows.start) & (places < rows.stop)
        found = torch.where(is_own.unsqueeze(1), local[torch.where(is_own, places - rows.start, 0)], found)
    distributed.all_reduce(found, distributed.ReduceOp.MAX, mesh.get_group())
    return found


def whole_on_cpu(ids: Tensor) -> Tensor:
    """A graph `[N, K]` as a whole on the CPU; of one that is sharded all ranks call it together, and gather int32."""
    if not isinstance(ids, DTensor):
        return ids.cpu()
    return gathered_on_cpu(ids, lambda rows, first: rows, ids.shape[1])


def gathered_on_cpu(ids: DTensor, select: Callable[[Tensor, int], Tensor], width: int) -> Tensor:
    """What `select` takes of all rows of sharded `ids [N, K]`, ids below N as well: `[N, width]`, int32 if they fit.

    Ranks call together. They select and gather in pieces: beyond the result little is held, on any device.

    Args:
        ids: int `[N, K]`.
        select: given some rows `[n, K]`, on the CPU, and the number of the first, returns `[n, width]`.
        width: of what it returns.
    """
    mesh, local, count = ids.device_mesh, ids.to_local(), ids.shape[0]
    dtype = torch.int32 if count <= 2**31 else torch.int64
    row_bytes = dtype.itemsize * width * mesh.size() + 8 * 8 * ids.shape[1]  # some eight int64 tensors, to select
    step = max(1, min(GATHERED_BYTES // row_bytes, chunk_rows(count, mesh)))
    gathered = torch.empty(count, width, dtype=dtype, device="cpu")
    for start in range(0, chunk_rows(count, mesh), step):
        some = local[start : start + step].cpu()
        selected = select(some, rows_of(count, mesh).start + start).to(local.device, dtype)
        selected = F.pad(selected, (0, 0, 0, step - len(selected)))
        pieces = [torch.empty_like(selected) for _ in range(mesh.size())]
        distributed.all_gather(pieces, selected, mesh.get_group())
        for rank, piece in enumerate(pieces):
            rows = rows_of(count, mesh, rank)
            first, last = (min(rows.start + each, rows.stop) for each in (start, start + step))
            gathered[first:last] = piece[: last - first]
    return gathered


def sharded(local: Tensor, num_rows: int, mesh: DeviceMesh) -> DTensor:
    """Rows of this rank, `[n, ...]`, as a part of a tensor `[num_rows, ...]`; no copy, the memory format stays."""
    shape = torch.Size((num_rows, *local.shape[1:]))
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=local.stride())


def own_rows(whole: Tensor, like: Tensor) -> DTensor:
    """The rows of a `whole` tensor that this rank has of `like`, sharded as that is; ranks give a `DTensor` together.

    Raises:
        ValueError: a `DTensor` of another mesh.
    """
    assert isinstance(like, DTensor)
    if isinstance(whole, DTensor):
        if whole.device_mesh != like.device_mesh:
            raise ValueError(f"expected a DTensor of the table's {like.device_mesh}, got one of {whole.device_mesh}")
        return whole.redistribute(placements=like.placements)
    rows = whole[rows_of(like.shape[0], like.device_mesh)].to(like.device)
    return sharded(rows.contiguous(), like.shape[0], like.device_mesh)


def new_table(
    shape: tuple[int, int, int, int], mesh: DeviceMesh, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    """A class table `[N, C, H, W]`, of which each rank makes its own rows: channels-last, `randn / sqrt(C)`."""
    rows = rows_of(shape[0], mesh)
    size = rows.stop - rows.start, *shape[1:]
    local = torch.empty(size, device=device, dtype=dtype, memory_format=torch.channels_last)
    table = nn.Parameter(sharded(local, shape[0], mesh))
    refuse_pickling(table)
    draw(table)
    return table


@torch.no_grad()
def draw(table: Tensor) -> None:
    """Draw the initial values of a sharded table, a block of classes at a time, each from its own seed.

    So the values of a class depend on the seed alone, which is the first rank's, not on the number of ranks.
    """
    assert isinstance(table, DTensor)
    local, mesh = table.to_local(), table.device_mesh
    seed = torch.randint(2**62, (1,), device="cpu").to(local.device)
    broadcast_from_first([seed], mesh)
    first, last = (rows := rows_of(table.shape[0], mesh)).start, rows.stop
    for start in range(first - first % BLOCK, last, BLOCK):
        generator = torch.Generator(local.device).manual_seed(int(seed) + start // BLOCK)
        size = BLOCK, *local.shape[1:]
        block = torch.randn(size, generator=generator, device=local.device, dtype=local.dtype)
        low, high = max(start, first), min(start + BLOCK, last)
        local[low - first : high - first] = block[low - start : high - start] / local.shape[1] ** 0.5


@torch.no_grad()
def broadcast_from_first(tensors: list[Tensor], mesh: DeviceMesh) -> None:
    """Make `tensors` what they are on the first rank of the mesh."""
    group = mesh.get_group()
    for tensor in tensors:
        distributed.broadcast(tensor, distributed.get_global_rank(group, 0), group)


def refuse_pickling(table: Tensor) -> None:
    """Make pickling of this very tensor raise: `torch.load` would return a table that has one rank's rows only."""
    table.__reduce_ex__ = _refuse  # type: ignore[method-assign]


def _refuse(protocol: Any) -> NoReturn:
    raise TypeError(
        "class_embed is sharded over a device mesh, and pickle (torch.save) would keep one rank's rows of it; save the "
        "state dict with torch.distributed.checkpoint, which loads it on any number of ranks, one included"
    )
