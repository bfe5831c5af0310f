"""What ranks of `torch.distributed` do together: one search of the class graph, sums of gradients, and errors that all
of them raise; over which of them a batch norm takes its statistics.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from .validation import MAP_DTYPES

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def has_ranks(group: Any = None) -> bool:
    """Whether `torch.distributed` is initialised, with several ranks in `group` (all where None)."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1


def is_in_ddp_forward() -> bool:
    """Whether a `DistributedDataParallel` runs its forward now, as it does on all ranks."""
    return has_ranks() and getattr(DistributedDataParallel, "_active_ddp_module", None) is not None


class _SharedByRanks(torch.autograd.Function):
    """Parameters that all ranks have alike; each one's gradient is the sum of the ranks' gradients by `divisor`."""

    @staticmethod
    def forward(ctx: Any, group: Any, divisor: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.divisor = group, divisor
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        joined = torch.cat([grad.flatten() for grad in grads])  # one message, not one for each parameter
        distributed.all_reduce(joined, group=ctx.group)
        parts = joined.div_(ctx.divisor).split([grad.numel() for grad in grads])
        of_all = [part.view_as(grad).to(grad.dtype) for part, grad in zip(parts, grads, strict=True)]
        return None, None, *of_all


def shared_by_ranks(parameters: list[Tensor], group: Any, divisor: int) -> list[Tensor]:
    """`parameters` whose gradients are the sums over the ranks of `group`, by `divisor`; all call it, in one order."""
    shared: tuple[Tensor, ...] = _SharedByRanks.apply(group, divisor, *parameters)  # type: ignore[no-untyped-call]
    return list(shared)


def statistics_group(norm: nn.Module, mesh: DeviceMesh | None) -> Any:
    """The group of ranks whose batches a norm's statistics are over; None for this rank's batch alone.

    That is the mesh's, or that of a `SyncBatchNorm` (`convert_sync_batchnorm`).
    """
    if mesh is not None:
        return mesh.get_group() if mesh.size() > 1 else None
    if isinstance(norm, nn.SyncBatchNorm) and has_ranks(norm.process_group):
        return norm.process_group or distributed.group.WORLD
    return None


def whole(tensor: Tensor) -> Tensor:
    """A `DTensor` gathered from all ranks, which call it together; any other tensor as it is."""
    full_tensor: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


def local_rows(tensor: Tensor) -> Tensor:
    """This rank's part of a `DTensor`; any other tensor as it is."""
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


class Agreement:
    """Context of what may fail on some ranks of a group: if it does on one, all raise, and none waits for another.

    All ranks enter it together. Within it these may be set: `size`; `needs_grad` and `lacks_graph`; `settings`, which
    have to be equal on all ranks; `dtype`, likewise where `size` is not 0. After it `sizes` has the sizes of all ranks,
    `needs_grad` and `lacks_graph` say whether they are true on any, and `dtype` is one for all.

    Args:
        mesh: of the ranks.
        device: of the messages.

    Raises:
        RuntimeError: at the end, where another rank failed, named with its error; where settings or dtypes differ.
    """

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self.mesh, self.device = mesh, device
        self.size, self.needs_grad, self.lacks_graph = 0, False, False
        self.settings, self.dtype = "", torch.float32
        self.sizes: list[int] = []

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception | None):  # Ctrl-C: not the time to wait for others
            return
        group, ranks = self.mesh.get_group(), self.mesh.size()
        size, settings = self.size if error is None else -1, zlib.crc32(self.settings.encode())
        values = size, self.needs_grad, self.lacks_graph, settings, MAP_DTYPES.index(self.dtype)
        own = torch.tensor(values, device=self.device)
        found = [torch.empty_like(own) for _ in range(ranks)]
        distributed.all_gather(found, own, group)
        self.sizes, needs_grad, lacks_graph, of_ranks, dtypes = torch.stack(found).T.tolist()
        self.needs_grad, self.lacks_graph = any(needs_grad), any(lacks_graph)
        counted = [dtype for dtype, size in zip(dtypes, self.sizes, strict=True) if size] or dtypes[:1]
        self.dtype = MAP_DTYPES[counted[0]]
        if min(self.sizes) >= 0 and len(set(of_ranks)) == 1 and len(set(counted)) == 1:
            return
        told: list[tuple[str, str]] = [("", "")] * ranks
        message = "" if error is None else f"{type(error).__name__}: {error}"
        distributed.all_gather_object(told, (message, self.settings), group)
        if error is not None:
            return
        for rank, (message, _) in enumerate(told):
            if message:
                raise RuntimeError(f"rank {rank} of the mesh failed: {message}")
        if len(set(of_ranks)) > 1:
            differ = "; ".join(f"rank {rank} has {its}" for rank, (_, its) in enumerate(told))
        else:
            differ = "; ".join(f"rank {rank} has maps in {MAP_DTYPES[dtype]}" for rank, dtype in enumerate(dtypes))
        raise RuntimeError(f"all ranks of the mesh have to call the matcher alike, but {differ}")


def computed_by_first_rank(compute: Callable[[], Tensor], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An int64 tensor that rank 0 computes and all ranks get; all of them call this.

    Args:
        compute: called on rank 0 only.
        shape: of the result.
        device: of the result.

    Raises:
        Exception: what `compute` raises, on rank 0.
        RuntimeError: on the other ranks then.
    """
    failure: list[Exception | str | None] = [None]
    result = torch.empty(shape, dtype=torch.int64, device=device)
    is_first = distributed.get_rank() == 0
    if is_first:
        try:
            result = compute().contiguous()
        except Exception as error:
            distributed.broadcast_object_list([f"{type(error).__name__}: {error}"], src=0)
            raise
    distributed.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise RuntimeError(f"rank 0 could not build the class graph: {failure[0]}")
    distributed.broadcast(result, src=0)
    return result


def batches_of_all_ranks(feature: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The batches of all ranks, one after the other; only this one where `torch.distributed` is not initialised."""
    if not has_ranks():
        return feature, target

    def gathered(tensor: Tensor) -> list[Tensor]:
        tensors = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(tensors, tensor)
        return tensors

    counts = torch.cat(gathered(target.new_tensor([len(target)]))).tolist()
    padding = max(counts) - len(target)
    features = gathered(F.pad(feature, (0, 0, 0, 0, 0, 0, 0, padding)).contiguous())
    targets = gathered(F.pad(target, (0, padding)))

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor[:count] for tensor, count in zip(tensors, counts, strict=True)])

    return joined(features), joined(targets)
