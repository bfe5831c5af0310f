"""What ranks of `torch.distributed` do together: sums of batch norms over all ranks, one search of the class graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


def has_ranks(group: Any = None) -> bool:
    """Whether `torch.distributed` is initialised, with several ranks in `group` (all where None)."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1


def is_in_ddp_forward() -> bool:
    """Whether a `DistributedDataParallel` runs its forward now, as it does on all ranks."""
    return has_ranks() and getattr(DistributedDataParallel, "_active_ddp_module", None) is not None


class _SumOverRanks(torch.autograd.Function):
    """A sum over the ranks; the gradient is the sum of the ranks' gradients, as in `SyncBatchNorm`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_over_ranks(values: Tensor, group: Any) -> Tensor:
    """The sum over the ranks of `group`, differentiable; all of them call it, in the same order."""
    total: Tensor = _SumOverRanks.apply(values, group)  # type: ignore[no-untyped-call]
    return total


def is_synced(norm: nn.Module) -> bool:
    """Whether a norm's batch statistics are those of all ranks (`SyncBatchNorm.convert_sync_batchnorm`)."""
    return isinstance(norm, nn.SyncBatchNorm) and has_ranks(norm.process_group)


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
