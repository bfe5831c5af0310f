"""PyTorch Lightning: a callback that builds the class graph (`pip install qaconv-triton[lightning]`)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from operator import attrgetter
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, distributed

from ..distributed import local_rows
from ..matcher import QAConv
from ..sampler import GraphSampler
from ..sharded.table import whole_on_cpu
from ..validation import check_count

try:
    import lightning.pytorch as lightning
    from lightning.pytorch.utilities.combined_loader import CombinedLoader
except ImportError as error:
    message = "qaconv_triton.integrations.lightning needs lightning: pip install qaconv-triton[lightning]"
    raise ImportError(message) from error

ROWS = 4096  # of two graphs that are compared at a time
logger = logging.getLogger(__name__)


class GraphSampling(lightning.Callback):  # type: ignore[misc]
    """Build the class graph anew every few epochs or steps, on all ranks together, and log what that took.

    Logs "graph/seconds" and "graph/changed", the share of neighbours that the graph before did not have. Under DDP rank
    0 searches and the others get its graph; where the class table is sharded, all search. The trainer's checkpoints
    hold the graph and the place of a `GraphSampler` in its epoch, so that a training that resumes inside an epoch goes
    on with the same batches. Lightning is kept from putting a `DistributedSampler` in a `GraphSampler`'s place, which
    deals the batches among the ranks itself.

    Args:
        matcher: the matcher's path in the LightningModule, as "criterion.matcher", or a function of the module that
            returns it.
        every_n_epochs: epochs between two builds.
        every_n_steps: steps between two builds, instead of epochs.
        draw: a function of a graph `[N, K]` that returns a figure of it, as by `plots.plot_neighbors`. Rank 0 logs it
            as "graph/neighbors", to loggers that take figures: TensorBoard's.

    Raises:
        TypeError: numbers that are not integers, a `draw` that cannot be called.
        ValueError: numbers below 1, or a matcher that is no `QAConv` with classes, once the training starts.

    Examples:
        >>> trainer = lightning.Trainer(callbacks=[GraphSampling("criterion.matcher")])  # doctest: +SKIP
    """

    def __init__(
        self,
        matcher: str | Callable[[Any], QAConv] = "matcher",
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        draw: Callable[[Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(matcher, str) and not callable(matcher):
            raise TypeError(f"matcher: expected a path or a function of the LightningModule, got {matcher!r}")
        if draw is not None and not callable(draw):
            raise TypeError(f"draw: expected a function of the class graph, got {draw!r}")
        self.draw = draw
        self._find: Callable[[Any], Any] = attrgetter(matcher) if isinstance(matcher, str) else matcher
        self.every_n_epochs = check_count(every_n_epochs, "every_n_epochs", low=1, high=None, why="epochs of one graph")
        if every_n_steps is not None:
            every_n_steps = check_count(every_n_steps, "every_n_steps", low=1, high=None, why="steps of one graph")
        self.every_n_steps = every_n_steps
        self._built_at: tuple[int, int] | None = None  # epoch and step
        self._position = 0  # batches of this epoch that were trained on, on all ranks together
        self._sampler_state: dict[str, Any] | None = None  # of a checkpoint, until the training starts

    def matcher_of(self, module: Any) -> QAConv:
        """The matcher of a LightningModule."""
        matcher = self._find(module)
        if not isinstance(matcher, QAConv) or matcher.num_classes is None:
            raise ValueError(f"matcher: expected a QAConv with num_classes, got {matcher!r}")
        return matcher

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave batch samplers to themselves."""
        trainer._accelerator_connector.use_distributed_sampler = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the sampler go on at the batch that the checkpoint was saved at."""
        state, self._sampler_state = self._sampler_state, None
        if state is None:
            return
        for loader in CombinedLoader(trainer.train_dataloader).flattened:
            sampler = getattr(loader, "batch_sampler", None)
            if isinstance(sampler, GraphSampler) and not hasattr(loader, "load_state_dict"):
                sampler.load_state_dict(state)
                if loader.num_workers:  # whose iterator has batches of another place already
                    iter(trainer.fit_loop._data_fetcher)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Build the graph if an epoch is due, or if there is none."""
        self._position = 0
        epoch, built_at = trainer.current_epoch, self._built_at
        is_due = self.every_n_steps is None and epoch % self.every_n_epochs == 0
        is_built = built_at is not None and self.matcher_of(pl_module).class_neighbors is not None
        if not is_built or (is_due and built_at is not None and built_at[0] != epoch):
            self._build(trainer, pl_module, on_step=False)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Build the graph if a step is due."""
        step = trainer.global_step
        if (
            self.every_n_steps is not None
            and self._built_at is not None
            and step >= self._built_at[1] + self.every_n_steps
        ):
            self._build(trainer, pl_module, on_step=True)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch."""
        self._position += trainer.world_size

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the graph, when it was built, and the sampler's place."""
        neighbors = self.matcher_of(pl_module).class_neighbors
        if neighbors is None or self._built_at is None:
            return
        kept = {"neighbors": whole_on_cpu(neighbors).int(), "built_at": self._built_at}
        for loader in CombinedLoader(trainer.train_dataloader).flattened:
            if isinstance(sampler := getattr(loader, "batch_sampler", None), GraphSampler):
                kept["sampler"] = {**sampler.state_dict(), "epoch": trainer.current_epoch, "position": self._position}
        checkpoint["qaconv_graph"] = kept

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore the graph, and the sampler's place when the training starts."""
        if kept := checkpoint.get("qaconv_graph"):
            self.matcher_of(pl_module).class_neighbors = kept["neighbors"].long()
            self._built_at = tuple(kept["built_at"])
            self._sampler_state = kept.get("sampler")
            self._position = self._sampler_state["position"] if self._sampler_state else 0

    def _build(self, trainer: Any, pl_module: Any, *, on_step: bool) -> None:
        matcher = self.matcher_of(pl_module)
        before, started = matcher.class_neighbors, perf_counter()
        neighbors = matcher.compute_class_neighbors()
        if neighbors.is_cuda:
            torch.cuda.synchronize(neighbors.device)
        seconds = perf_counter() - started
        self._built_at = trainer.current_epoch, trainer.global_step
        values = {"graph/seconds": seconds}
        if before is not None:
            values["graph/changed"] = changed_share(before, neighbors)
        pl_module.log_dict(values, on_step=on_step, on_epoch=not on_step, batch_size=1, sync_dist=True)
        if self.draw is not None:
            graph = whole_on_cpu(neighbors).long()
            writers = [each.experiment for each in trainer.loggers if hasattr(each.experiment, "add_figure")]
            for writer in writers if trainer.is_global_zero else ():
                writer.add_figure("graph/neighbors", self.draw(graph), trainer.global_step)
        logger.info("class graph of %d classes built in %.2f s", len(neighbors), seconds)


def changed_share(before: Tensor, after: Tensor) -> float:
    """The share of the ids `after [N, K]` that are not in the same row of `before [N, K]`.

    Of graphs that are sharded over a mesh, alike, its ranks call it together.

    Examples:
        >>> changed_share(torch.tensor([[1, 2], [0, 2]]), torch.tensor([[2, 3], [2, 0]]))
        0.25
    """
    found = torch.zeros((), dtype=torch.int64, device=after.device)
    for old, new in zip(local_rows(before).split(ROWS), local_rows(after).split(ROWS), strict=True):
        ordered = old.to(new.device).sort(dim=1).values
        places = torch.searchsorted(ordered, new.contiguous()).clamp(max=ordered.shape[1] - 1)
        found += (ordered.gather(1, places) == new).sum()
    if hasattr(after, "device_mesh"):
        distributed.all_reduce(found, group=after.device_mesh.get_group())
    return 1.0 - int(found) / max(after.numel(), 1)
