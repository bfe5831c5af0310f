"""A loss against one remembered feature map per class, as in QAConv.

Liao & Shao, "Interpretable and Generalizable Person Re-Identification with Query-Adaptive Convolution and Temporal
Lifting", arXiv:1904.10424. Letters as in losses.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import checkpoint
from .distributed import batches_of_all_ranks
from .losses import MatcherLoss
from .recompute import MemoryLog, StatisticsGuard, is_recomputing
from .validation import check_count, check_device, check_labels, check_maps


class ClassMemoryLoss(MatcherLoss):
    """Focal binary cross entropy against a memory of one feature map per class, the last one seen of it.

    Classes not seen yet do not count. The memory takes in every batch after its loss, in evaluation mode as
    well, as published; where a class comes several times in a batch, its last sample stays.

    - Under activation checkpointing (`torch.utils.checkpoint`, in both modes) a forward that is run again sees the
      memory as it was the first time, and changes nothing. At most the last 8 forwards can be run again.
    - Where `torch.distributed` is initialised, every rank remembers the batches of all ranks, in the order of the
      ranks; a forward is then a collective call, in evaluation mode as well. Batches may differ in size.
    - `class_memory` and `valid_class` are in the state dict and follow `.to()`, but are no buffers:
      `DistributedDataParallel` does not broadcast them, and weight averaging does not average them.

    Args:
        matcher: the module that scores samples against the memory, `QAConv` or another with
            `forward(prob_fea, gal_fea)`. The memory is on its device, in float32 (float64 for a float64 matcher).
        num_classes: N.
        num_features: C.
        height: H.
        width: W.
        mem_batch_size: classes matched at a time; each such call has its own batch statistics.

    Raises:
        TypeError: a matcher that is none, a count that is not an integer.
        ValueError: a count below 1, a matcher with a mesh.

    Examples:
        >>> matcher = QAConv(num_features=8, height=4, width=4)
        >>> loss_function = ClassMemoryLoss(matcher, num_classes=10, num_features=8, height=4, width=4)
        >>> feature = torch.randn(6, 8, 4, 4, requires_grad=True)
        >>> loss, accuracy = loss_function(feature, torch.tensor([0, 0, 7, 7, 9, 9]))
        >>> loss.mean().backward()
        >>> loss_function.valid_class
        tensor([1., 0., 0., 0., 0., 0., 0., 1., 0., 1.])

    Reference: Liao & Shao, arXiv:1904.10424; focal loss: Lin et al., arXiv:1708.02002.
    """

    class_memory: Tensor  # [N, C, H, W]
    valid_class: Tensor  # [N], 1 for a class that was seen, else 0
    _STATE = ("class_memory", "valid_class")

    def __init__(
        self,
        matcher: nn.Module,
        num_classes: SupportsIndex,
        num_features: SupportsIndex,
        height: SupportsIndex,
        width: SupportsIndex,
        mem_batch_size: SupportsIndex = 16,
    ) -> None:
        super().__init__(matcher)
        if getattr(matcher, "mesh", None) is not None:
            raise ValueError(
                "a class memory is whole on every rank, but the matcher's class table is sharded over a mesh"
            )
        self.num_classes = check_count(num_classes, "num_classes", low=1, high=None, why="classes in the memory")
        self.num_features = check_count(num_features, "num_features", low=1, high=None, why="channels of a feature map")
        self.height = check_count(height, "height", low=1, high=None, why="of a feature map")
        self.width = check_count(width, "width", low=1, high=None, why="of a feature map")
        self.mem_batch_size = check_count(
            mem_batch_size, "mem_batch_size", low=1, high=None, why="classes matched at a time"
        )
        like = next(matcher.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        shape = (self.num_classes, self.num_features, self.height, self.width)
        self.class_memory = torch.zeros(shape, dtype=dtype, device=like.device)
        self.valid_class = torch.zeros(self.num_classes, dtype=dtype, device=like.device)
        self._log = MemoryLog()
        self._loaded: tuple[dict[str, Tensor], bool] = {}, False  # and whether it is assigned, not copied
        self.register_load_state_dict_post_hook(_take_loaded)  # type: ignore[no-untyped-call]

    def reset_running_stats(self) -> None:
        """Forget all classes, and reset the matcher's running statistics."""
        self.class_memory.zero_()
        self.valid_class.zero_()
        self._log.clear()
        super().reset_running_stats()

    def forward(self, feature: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the accuracy of every sample, then remember the samples.

        Args:
            feature: feature maps `[B, C, H, W]`, floating point.
            target: class ids `[B]`, integers in `[0, N)`.

        Returns:
            loss `[B]`, summed over the classes seen before this batch; accuracy `[B]`, 1 where the target
            scores highest. An invalid target on CUDA, where it is not read back, gives a NaN loss and is not
            remembered.

        Raises:
            TypeError: `feature` or `target` of another dtype.
            ValueError: another shape or device.
            IndexError: a target outside `[0, N)`.
            RuntimeError: a forward within a backward pass that repeats none of the last forwards.
        """
        check_maps(feature, "feature", channels=self.num_features, height=self.height, width=self.width)
        check_device(feature, "feature", self.class_memory.device, "the class memory")
        target = check_labels(target, len(feature), self.num_classes, feature.device)
        with StatisticsGuard(self.matcher):
            if is_recomputing():
                with self._log.rewound(self.class_memory, self.valid_class, feature, target):
                    return self._loss_and_accuracy(feature, target)
            loss, accuracy = self._loss_and_accuracy(feature, target)
            self._remember(feature.detach(), target, loss)
            return loss, accuracy

    def _loss_and_accuracy(self, feature: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        # The memory changes before the backward pass, which therefore works on copies.
        copies = (
            chunk.clone(memory_format=torch.channels_last)
            for chunk in torch.split(self.class_memory, self.mem_batch_size)
        )
        score = torch.cat([self._scores(feature, chunk) for chunk in copies], dim=1)
        is_target = target[:, None] == torch.arange(self.num_classes, device=target.device)
        loss = F.binary_cross_entropy_with_logits(score, is_target.to(score.dtype), reduction="none")
        probability = score.sigmoid()
        weight = torch.where(is_target, 1 - probability, probability).square()
        loss = (loss * weight).masked_fill(self.valid_class == 0, 0.0).sum(dim=1)
        loss = loss.masked_fill(~is_target.any(dim=1), math.nan)
        return loss, (score.argmax(dim=1) == target).to(score.dtype)

    @torch.no_grad()
    def _remember(self, feature: Tensor, target: Tensor, loss: Tensor) -> None:
        """Store each class's last sample, without a race: all writes to a row carry the same value.

        An invalid target is led to some row, and writes what the row holds anyway.
        """
        features, targets = batches_of_all_ranks(feature, target)
        if not len(targets):
            return
        row = targets.clamp(0, self.num_classes - 1)
        sample = torch.arange(len(targets), device=targets.device)
        last = torch.where(targets == row[:, None], sample, -1).amax(dim=1)
        seen = last >= 0  # [B], False where no sample is of the row's class
        new = features[last.clamp(min=0)].to(self.class_memory.dtype)
        old, old_flags = self.class_memory[row], self.valid_class[row]
        maps, flags = torch.where(seen[:, None, None, None], new, old), torch.where(seen, 1.0, old_flags)
        if torch.compiler.is_compiling():
            # A compiled backward pass may compute again what it needs from the memory: that must not change.
            self.class_memory = self.class_memory.index_put((row,), maps)
            self.valid_class = self.valid_class.index_put((row,), flags)
            return
        self._log.record(feature, target, loss, row, old, old_flags)
        self.class_memory[row] = maps
        self.valid_class[row] = flags

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassMemoryLoss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self._STATE:
            setattr(self, name, fn(getattr(self, name)))
        self._log.clear()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._STATE:
            destination[prefix + name] = getattr(self, name).detach().contiguous()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load the memory as `nn.Module` loads a buffer; nothing, the matcher's included, if one does not fit."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        keys = {name: prefix + name for name in self._STATE}
        if strict:
            missing_keys += [key for key in keys.values() if key not in state_dict]
        unexpected_keys[:] = [key for key in unexpected_keys if key not in keys.values()]
        loaded = {name: state_dict[key] for name, key in keys.items() if key in state_dict}
        errors = []
        for name, value in loaded.items():
            shape = value.shape if isinstance(value, Tensor) else type(value).__name__
            if shape != getattr(self, name).shape:
                errors.append(f"size mismatch for {keys[name]}: {shape} for {getattr(self, name).shape} in this module")
        checkpoint.refuse(self, errors)  # before the matcher is loaded
        self._loaded = loaded, local_metadata.get("assign_to_params_buffers", False)


def _take_loaded(module: ClassMemoryLoss, _: Any) -> None:
    """Take the memory of a state dict that the matcher, which is loaded between the two, has not refused."""
    values, is_assigned = module._loaded
    with torch.no_grad():
        for name, value in values.items():
            if is_assigned:
                setattr(module, name, value.detach())
            else:
                getattr(module, name).copy_(value)
    module._loaded = {}, False
    module._log.clear()
