"""QAConv as a module: it keeps the parameters and the class graph, and puts the functional pieces together.

Query-adaptive convolution: Liao & Shao, ECCV 2020, arXiv:1904.10424. Graph sampling: CVPR 2022, arXiv:2104.01546.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checkpoint, functional, sharded
from .correspondences import Correspondences, find_correspondences
from .distributed import Agreement, computed_by_first_rank, has_ranks, is_in_ddp_forward, local_rows
from .head import BatchStatistics, Head, check_pairs, update_running_statistics
from .progress import Progress
from .scores import PAIRS, ClassScores, prepared_pairs, score_gallery, score_maps
from .validation import (
    check_count,
    check_device,
    check_flag,
    check_index,
    check_labels,
    check_layout,
    check_maps,
    check_visibility,
    values_may_be_read,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SAMPLED_ROWS = 16  # of a class table, and of the values of each


class QAConv(checkpoint.CheckedModule):
    """Score pairs of maps by their best local matches; with labels, each against the K classes nearest to its own.

    Args:
        num_features: C, channels of the feature maps.
        height: H.
        width: W.
        num_classes: N, size of the class table `class_embed [N, C, H, W]`; no class path where None.
        k_nearest: K, neighbour classes per class, between 1 and N - 1.
        include_self: score a sample's own class as well, after its K neighbours.
        sparse_grad: `class_embed.grad` is a `torch.sparse_coo` tensor of the touched rows, for `SparseAdam` or `SGD`,
            as with `nn.Embedding(sparse=True)`. Not under `torch.compile` or `DistributedDataParallel`. The table is
            then laid out as those optimizers need it, contiguous, not channels-last: matching reads it more slowly.
        shared_fc: one `fc.weight [1, S]` for both halves of the pooled values, whose bias counts twice, as QAConv 2.1
            and later train it. Then their checkpoints resume exactly, the optimizer's state included.
        mesh: a one-dimensional `DeviceMesh`, over whose ranks the class table is sharded: `class_embed` is a `DTensor`,
            `Shard(0)`, and each rank makes its own rows. All ranks then call the module together, each with its own
            batch: see docs/many-devices.md.
        device: of the parameters; the current one of the mesh where None.
        dtype: of the parameters.

    Raises:
        TypeError: a size that is not an integer, a flag that is not a bool, a mesh that is none.
        ValueError: a size below 1, or `k_nearest` above N - 1; a mesh of several dimensions, of another device type,
            without a class table, or with `sparse_grad`.

    Examples:
        >>> matcher = QAConv(64, 7, 7, num_classes=100, k_nearest=10)
        >>> features, labels = torch.randn(4, 64, 7, 7), torch.tensor([3, 3, 8, 8])
        >>> matcher(features, labels=labels).shape  # against 10 classes each, zero elsewhere
        torch.Size([4, 100])
        >>> matcher(features, "same").shape  # all pairs of the batch
        torch.Size([4, 4])
    """

    class_embed: nn.Parameter | None

    _version = checkpoint.VERSION  # torch writes it into the metadata of a state dict

    def __init__(
        self,
        num_features: int,
        height: int,
        width: int,
        num_classes: int | None = None,
        k_nearest: int = 20,
        *,
        include_self: bool = False,
        sparse_grad: bool = False,
        shared_fc: bool = False,
        mesh: DeviceMesh | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_features, height, width = (
            check_count(value, name, low=1, high=None, why="the size of a feature map")
            for value, name in ((num_features, "num_features"), (height, "height"), (width, "width"))
        )
        k_nearest = check_count(k_nearest, "k_nearest", low=1, high=None, why="neighbours per class")
        if num_classes is not None:
            why = "a class needs another as its neighbour"
            num_classes = check_count(num_classes, "num_classes", low=2, high=None, why=why)
            check_count(k_nearest, "k_nearest", low=1, high=num_classes - 1, why=f"num_classes is {num_classes}")
        for flag, name in ((include_self, "include_self"), (sparse_grad, "sparse_grad"), (shared_fc, "shared_fc")):
            check_flag(flag, name)
        if mesh is not None:
            sharded.table.check_mesh(mesh, num_classes, sparse_grad, device)
            device = sharded.table.device_of(mesh) if device is None else device
        self.num_features = num_features
        self.height = height
        self.width = width
        self.k_nearest = k_nearest
        self.include_self = include_self
        self.sparse_grad = sparse_grad
        self.shared_fc = shared_fc
        self.bn = nn.BatchNorm1d(1, device=device, dtype=dtype)
        self.fc = nn.Linear((1 if shared_fc else 2) * height * width, 1, device=device, dtype=dtype)
        self.logit_bn = nn.BatchNorm1d(1, device=device, dtype=dtype)
        nn.init.constant_(self.fc.weight, 1.0 / (height * width))
        if num_classes is None:
            self.register_parameter("class_embed", None)
        elif mesh is not None:
            self.class_embed = sharded.table.new_table((num_classes, num_features, height, width), mesh, device, dtype)
            sharded.table.broadcast_from_first(list(self.fc.parameters()), mesh)
        else:
            table = torch.randn(num_classes, num_features, height, width, device=device, dtype=dtype)
            table.div_(num_features**0.5)
            # Channels-last is how kernels read it. With a contiguous table a step takes 1.8 times as long on a CPU, and
            # kernels lose their wide loads. Torch's optimizers add a sparse gradient to a contiguous parameter only.
            layout = torch.contiguous_format if sparse_grad else torch.channels_last
            self.class_embed = nn.Parameter(table.to(memory_format=layout))
        self._graph: Tensor | None = None
        self._copied_table: Tensor | None = None  # a sample of a copy's table, until the copied graph is used
        self._last_graph: Tensor | None = (
            None  # as computed or assigned, if dropped since: the next search starts there
        )
        self._pending_gallery: Tensor | None = None
        self._warned_of_gallery_visibility = False

    @property
    def num_classes(self) -> int | None:
        """N, the number of classes in the table; None without one."""
        return None if self.class_embed is None else self.class_embed.shape[0]

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh that the class table is sharded over; None for a table that is whole."""
        return getattr(self.class_embed, "device_mesh", None)

    @property
    def class_neighbors(self) -> Tensor | None:
        """The class graph, int64 `[N, K]` on the module's device; None until it is built, or after it is dropped.

        An attribute, not a buffer: it is in no state dict, and is neither averaged nor broadcast. A graph of your own
        may be assigned, or one saved with a checkpoint: the next search starts from it, as it would have done. Of a
        sharded table it is a `DTensor`, `Shard(0)`; `.full_tensor()` on all ranks makes it whole, and all ranks assign
        one together, whole or a `DTensor`.

        Raises:
            TypeError: assigned something else than an int64 tensor.
            ValueError: assigned another shape, or without a class table.
            IndexError: assigned an id outside `[0, N)`.
            RuntimeError: another rank of the mesh was assigned what is none.
        """
        if self._copied_table is not None and not torch.compiler.is_compiling():
            # This copy's table was written to before its graph was used, as by averaging: the graph is another's.
            sample = self._sample_table()
            if sample is None or not torch.equal(self._copied_table, sample):
                self._graph = self._copied_table = None
        return self._graph

    @class_neighbors.setter
    def class_neighbors(self, neighbors: Tensor | None) -> None:
        if neighbors is not None:
            table = self._class_table()
            shape, name = (table.shape[0], self.k_nearest), "class_neighbors"
            agreement = None if self.mesh is None else Agreement(self.mesh, table.device)
            with agreement or nullcontext():
                if not isinstance(neighbors, Tensor) or neighbors.dtype != torch.int64:
                    got = neighbors.dtype if isinstance(neighbors, Tensor) else type(neighbors).__name__
                    raise TypeError(f"{name}: expected an int64 tensor {list(shape)}, got {got}")
                check_layout(neighbors, name)
                if tuple(neighbors.shape) != shape:
                    raise ValueError(f"{name}: expected shape {list(shape)}, got {list(neighbors.shape)}")
                if agreement is not None:
                    agreement.settings = f"a graph on {getattr(neighbors, 'placements', 'each rank')}"
            if agreement is not None:
                neighbors = sharded.table.own_rows(neighbors, table)
            with agreement or nullcontext():
                if not neighbors.is_meta:
                    check_index(local_rows(neighbors), shape[0], name, "classes")
            neighbors = self._last_graph = neighbors.detach().to(table.device)
        self._graph, self._copied_table = neighbors, None

    def extra_repr(self) -> str:
        """Describe the sizes, as `print(matcher)` shows them."""
        text = f"{self.num_features}, {self.height}, {self.width}"
        if self.class_embed is not None:
            text += f", num_classes={self.num_classes}, k_nearest={self.k_nearest}, include_self={self.include_self}"
        return text + (", shared_fc=True" if self.shared_fc else "")

    def forward(
        self,
        prob_fea: Tensor,
        gal_fea: Tensor | str | None = None,
        labels: Tensor | None = None,
        prob_occ: Tensor | None = None,
        gal_occ: Tensor | None = None,
    ) -> Tensor:
        """Score probes against a gallery, against each other, or against classes.

        What a backward pass needs is kept, unless gradients are off; for a large gallery `match` is the one to call.

        Args:
            prob_fea: probe maps `[P, C, H, W]`, float16, bfloat16, float32 or float64, on the module's device.
            gal_fea: gallery maps `[G, C, H, W]`; "same" for the probes themselves; None for the maps set by
                `make_kernel`, once, or else for the classes.
            labels: integer class ids `[P]`: score each probe against its class's neighbours only. None scores every
                class. Without meaning when there is a gallery.
            prob_occ: visibility of the probes' locations `[P, 1, H, W]` in [0, 1], 1 visible; all visible where None.
            gal_occ: visibility of the gallery's locations `[G, 1, H, W]`. Classes are fully visible.

        Returns:
            Scores `[P, G]`, or `[P, N]` on the class path, where columns that were not scored are 0; fp32 (fp64 for
            fp64).

        Raises:
            TypeError: integer or complex features or visibility; labels that are not integers.
            ValueError: shapes or devices that do not fit the module, another string than "same", no class table.
            IndexError: a label that is not a class; on CUDA such a row is NaN unless `QACONV_TRITON_CHECKS=1`.
        """
        if isinstance(gal_fea, str) and gal_fea != "same":
            raise ValueError(f'gal_fea: expected a tensor, "same" or None, got {gal_fea!r}')
        if gal_fea is None and self._pending_gallery is None:  # every class, or with labels each class's neighbours
            return self._forward_classes(prob_fea, labels, prob_occ, gal_occ)
        gallery = prob_fea if isinstance(gal_fea, str) else self._pending_gallery if gal_fea is None else gal_fea
        assert gallery is not None
        head = self._head
        agreement = self._agreement_on_pairs(head)
        with agreement or nullcontext():
            self._check_maps(prob_fea, prob_occ, "prob_fea", "prob_occ")
            if gallery is not prob_fea or gal_occ is not prob_occ:
                self._check_maps(gallery, gal_occ, "gal_fea", "gal_occ")
            if agreement is not None:
                sharded.scores.agree_on_pairs(agreement, self, prob_fea)
        scores, statistics = score_gallery(head, prob_fea, gallery, prob_occ, gal_occ, evaluate=False)
        update_running_statistics(statistics)
        if gallery is self._pending_gallery:
            self._pending_gallery = None
        return scores

    def class_scores(self, prob_fea: Tensor, labels: Tensor, prob_occ: Tensor | None = None) -> ClassScores:
        """Score every sample against its class's neighbours, in compact form; counts as one forward.

        Args:
            prob_fea: `[B, C, H, W]`, as for `forward`.
            labels: integer class ids `[B]`.
            prob_occ: visibility `[B, 1, H, W]`.

        Returns:
            `ClassScores` with values and classes `[B, K]`, or `[B, K + 1]` with `include_self`, own class last.

        Raises:
            TypeError, ValueError, IndexError: as for `forward`.
        """
        scores, statistics, neighbors = self._score_neighbors(prob_fea, labels, prob_occ)
        self._finish(statistics, neighbors)
        return scores

    def _score_neighbors(
        self, prob_fea: Tensor, labels: Tensor, prob_occ: Tensor | None
    ) -> tuple[ClassScores, list[BatchStatistics], Tensor]:
        """Score samples as `class_scores` does, without a change of the module: that is left to `_finish`."""
        table = self._class_table()
        if self.mesh is not None:
            return sharded.scores.score_neighbors(self, prob_fea, labels, prob_occ)
        self._check_maps(prob_fea, prob_occ, "prob_fea", "prob_occ")
        head, classes = self._head, table.shape[0]
        labels = check_labels(labels, prob_fea.shape[0], classes, prob_fea.device)
        check_pairs(prob_fea.shape[0] * (self.k_nearest + self.include_self), head)
        neighbors = self._current_neighbors()
        invalid = None
        if values_may_be_read(labels):
            index = neighbors.index_select(0, labels)
        else:
            known = labels.clamp(0, classes - 1)
            invalid, index = labels != known, neighbors.index_select(0, known)
        if self.include_self:
            index = torch.cat([index, labels.unsqueeze(1)], dim=1)
        if invalid is not None:
            index.masked_fill_(invalid.unsqueeze(1), -1)
        probe = functional.prepare_maps(prob_fea, prob_occ, functional.correlation_dtype(prob_fea))
        scores, statistics = score_maps(
            head, probe, table, index, labels, raw=True, sparse_grad=self.sparse_grad, invalid=invalid
        )
        return ClassScores(scores, index, classes), statistics, neighbors

    def _finish(self, statistics: list[BatchStatistics], neighbors: Tensor | None = None) -> None:
        """Take over what a call has found, when nothing can fail any more: the graph it built and its statistics."""
        if neighbors is not None:
            if neighbors is not self._graph:
                self._graph = self._last_graph = neighbors
            self._copied_table = None
        update_running_statistics(statistics)

    @torch.no_grad()
    def match(
        self,
        probe_features: Tensor,
        gallery_features: Tensor,
        probe_occ: Tensor | None = None,
        gallery_occ: Tensor | None = None,
    ) -> Tensor:
        """Score every probe against every gallery item in eval mode, without gradients, in bounded memory.

        Args:
            probe_features: `[P, C, H, W]`.
            gallery_features: `[G, C, H, W]`.
            probe_occ: visibility `[P, 1, H, W]`.
            gallery_occ: visibility `[G, 1, H, W]`.

        Returns:
            `[P, G]`, fp32 (fp64 for fp64). The module's mode is as before.

        Raises:
            TypeError, ValueError: as for `forward`.
        """
        self._check_maps(probe_features, probe_occ, "probe_features", "probe_occ")
        self._check_maps(gallery_features, gallery_occ, "gallery_features", "gallery_occ")
        return score_gallery(self._head, probe_features, gallery_features, probe_occ, gallery_occ, evaluate=True)[0]

    @torch.no_grad()
    def match_pairs(
        self,
        probe_features: Tensor,
        gallery_features: Tensor,
        probe_occ: Tensor | None = None,
        gallery_occ: Tensor | None = None,
    ) -> Tensor:
        """Score probe b against gallery item b: the diagonal of `match`, `[B]`, without the rest of it.

        Raises:
            TypeError, ValueError: as for `forward`; also when there are not as many gallery items as probes.
        """
        names = "probe_features", "gallery_features", "probe_occ", "gallery_occ"
        self._check_pairs_of_maps(probe_features, gallery_features, probe_occ, gallery_occ, names)
        step = PAIRS if self._head.needs_sums_only(evaluate=True) else max(probe_features.shape[0], 1)
        scores = [
            score_maps(self._head, probe, gallery, index, evaluate=True)[0].squeeze(1)
            for probe, gallery, index in prepared_pairs(probe_features, gallery_features, probe_occ, gallery_occ, step)
        ]
        return torch.cat(scores)

    @torch.no_grad()
    def correspondences(
        self, a: Tensor, b: Tensor, a_occ: Tensor | None = None, b_occ: Tensor | None = None
    ) -> Correspondences:
        """Find each location's best match on the other map, both ways, for map i of `a` and map i of `b`.

        These are the matches whose similarities `match_pairs` turns into a score: what to draw to see why two maps
        match. (Liao & Shao, arXiv:1904.10424, section 3.2.)

        Args:
            a: `[B, C, H, W]`, as for `forward`.
            b: `[B, C, H, W]`.
            a_occ: visibility of a's locations `[B, 1, H, W]`; it weights similarities.
            b_occ: visibility of b's locations `[B, 1, H, W]`.

        Returns:
            `Correspondences`, two pairs of `[B, H, W]`: `b_location` and `similarity_a` for the locations of a,
            `a_location` and `similarity_b` for those of b. The lowest location where several are as similar.

        Raises:
            TypeError, ValueError: as for `match_pairs`.

        Examples:
            >>> matcher, maps = QAConv(8, 2, 2), torch.randn(1, 8, 2, 2)
            >>> found = matcher.correspondences(maps, maps.flip(3))  # a mirror image: left is right
            >>> found.b_location[0].tolist()
            [[1, 0], [3, 2]]
        """
        self._check_pairs_of_maps(a, b, a_occ, b_occ, ("a", "b", "a_occ", "b_occ"))
        return find_correspondences(a, b, a_occ, b_occ)

    def compute_class_neighbors(self, *, progress: bool | Progress = False) -> Tensor:
        """Build the class graph now, from the class table as it is: int64 `[N, K]`, kept in `class_neighbors`.

        From the second time on, the graph before is where the search starts from. In training mode, where
        `torch.distributed` is initialised, all ranks call it together: rank 0 searches, and all get its graph. Where
        the table is sharded, the ranks of the mesh search together, in either mode, and always from the start: the
        graph is a `DTensor`.

        Args:
            progress: as of `functional.class_neighbors`.

        Raises:
            ValueError: no class table, `k_nearest` out of range, NaN or Inf in the table.
            RuntimeError: rank 0, or another rank of the mesh, could not build the graph.
        """
        neighbors = self._search_neighbors(progress, together=self.training and has_ranks())
        self._graph, self._last_graph, self._copied_table = neighbors, neighbors, None
        return neighbors

    def reset_class_neighbors(self) -> None:
        """Drop the class graph; the next class-path forward builds it anew."""
        self._graph = self._copied_table = None

    def on_epoch_start(self) -> None:
        """Drop the class graph, for the classes have moved."""
        self.reset_class_neighbors()

    def make_kernel(self, feature: Tensor) -> None:
        """Keep `feature [G, C, H, W]` as the gallery of the next `forward` that is given none."""
        self._check_maps(feature, None, "feature", "")
        self._pending_gallery = feature

    def reset_running_stats(self) -> None:
        """Reset the batch norms' running statistics and drop the class graph."""
        self.bn.reset_running_stats()
        self.logit_bn.reset_running_stats()
        self.reset_class_neighbors()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as at construction, and drop the class graph."""
        self.bn.reset_parameters()
        self.logit_bn.reset_parameters()
        self.fc.reset_parameters()
        nn.init.constant_(self.fc.weight, 1.0 / (self.height * self.width))
        if self.mesh is not None:
            sharded.table.draw(self._class_table())
            sharded.table.broadcast_from_first(list(self.fc.parameters()), self.mesh)
        elif self.class_embed is not None:
            nn.init.normal_(self.class_embed, std=self.num_features**-0.5)
        self.reset_class_neighbors()
        self._last_graph = None

    def clone(self) -> QAConv:
        """Return an independent copy: parameters, statistics, mode, device and class graph."""
        twin = copy.deepcopy(self)
        if self.mesh is not None:
            twin._graph = self._graph
        return twin

    def _forward_classes(
        self, prob_fea: Tensor, labels: Tensor | None, prob_occ: Tensor | None, gal_occ: Tensor | None
    ) -> Tensor:
        table, neighbors = self._class_table(), None
        if labels is not None:
            class_scores, statistics, neighbors = self._score_neighbors(prob_fea, labels, prob_occ)
            scores = class_scores.to_dense()
        elif self.mesh is not None:
            scores, statistics = sharded.scores.score_classes(self, prob_fea, prob_occ)
        else:
            self._check_maps(prob_fea, prob_occ, "prob_fea", "prob_occ")
            probe = functional.prepare_maps(prob_fea, prob_occ, functional.correlation_dtype(prob_fea))
            scores, statistics = score_maps(self._head, probe, table, raw=True, sparse_grad=self.sparse_grad)
        if gal_occ is not None and not self._warned_of_gallery_visibility:
            # five frames up: this one, forward, two of nn.Module, the caller
            warnings.warn("gal_occ is ignored on the class path: class maps are fully visible", stacklevel=5)
            self._warned_of_gallery_visibility = True
        self._finish(statistics, neighbors)
        return scores

    def _agreement_on_pairs(self, head: Head | None = None) -> Agreement | None:
        """Of the ranks that take batch statistics of all pairs together, or gradients in training, if they do."""
        head = self._head if head is None else head
        if head.mesh is None or head.mesh.size() == 1:
            return None
        has_statistics = any(head.statistics_group(norm, False) for norm in (head.bn, head.logit_bn))
        has_backward = self.training and torch.is_grad_enabled()
        return Agreement(head.mesh, head.fc.weight.device) if has_statistics or has_backward else None

    @property
    def _head(self) -> Head:
        return Head(self.bn, self.fc, self.logit_bn, self.mesh)

    def _class_table(self) -> Tensor:
        if self.class_embed is None:
            raise ValueError("the class path needs a class table: QAConv was built without num_classes")
        return self.class_embed

    def _current_neighbors(self) -> Tensor:
        """The class graph, searched for if there is none or the table or `k_nearest` was replaced; not kept."""
        graph = self._fitting_graph()
        return self._search_neighbors(together=self.training and is_in_ddp_forward()) if graph is None else graph

    def _fitting_graph(self) -> Tensor | None:
        """The class graph, if there is one of this table and `k_nearest`."""
        graph, table = self.class_neighbors, self._class_table()
        if graph is None or tuple(graph.shape) != (table.shape[0], self.k_nearest):
            return None
        return graph.to(table.device)  # replicas of DataParallel share the first one's

    def _search_neighbors(self, progress: bool | Progress = False, *, together: bool = False) -> Tensor:
        """Search the neighbours of every class, starting from the last graph; nothing is kept.

        Ranks that do it `together` get the graph of the first.
        """
        if torch.compiler.is_compiling():  # a break of the graph; as a decorator, `disable` imports the compiler
            neighbors: Tensor = torch.compiler.disable(QAConv._search_neighbors)(self, progress, together=together)
            return neighbors
        table, previous = self._class_table(), self._last_graph
        if self.mesh is not None:
            return sharded.graph.search_neighbors(table, self.k_nearest, progress)
        shape = table.shape[0], self.k_nearest
        if previous is not None and tuple(previous.shape) != shape:
            previous = None
        search = partial(functional.class_neighbors, table, self.k_nearest, previous=previous, progress=progress)
        return computed_by_first_rank(search, shape, table.device) if together else search()

    def _sample_table(self) -> Tensor | None:
        """Some values of the table of a graph: they tell whether all of it was written to, through `.data` or not."""
        if self._graph is None or self._graph.is_meta or self.mesh is not None:
            return None
        table = self._class_table().detach()
        rows = table[:: max(1, table.shape[0] // SAMPLED_ROWS)].flatten(1)
        return rows[:, :: max(1, rows.shape[1] // SAMPLED_ROWS)].clone()

    @property
    def _map_sizes(self) -> dict[str, int]:
        """Of the maps that are matched, as `check_maps` takes them."""
        return {"channels": self.num_features, "height": self.height, "width": self.width}

    def _check_maps(self, maps: Tensor, visibility: Tensor | None, name: str, visibility_name: str) -> None:
        check_maps(maps, name, **self._map_sizes)
        check_device(maps, name, self.fc.weight.device, "the matcher")
        if visibility is not None:
            check_visibility(visibility, visibility_name, maps)

    def _check_pairs_of_maps(
        self, a: Tensor, b: Tensor, a_occ: Tensor | None, b_occ: Tensor | None, names: tuple[str, str, str, str]
    ) -> None:
        self._check_maps(a, a_occ, names[0], names[2])
        self._check_maps(b, b_occ, names[1], names[3])
        if a.shape[0] != b.shape[0]:
            raise ValueError(
                f"pairs need as many maps in {names[1]} as in {names[0]}, got {list(b.shape)} for {list(a.shape)}"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> QAConv:
        is_copy = self.class_neighbors is not None and self._copied_table is not None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.mesh is not None:
            sharded.table.refuse_pickling(self._class_table())  # it may be another tensor now
        device = self.fc.weight.device

        def moved(graph: Tensor | None) -> Tensor | None:
            # ids stay int64, whatever `fn` does to numbers; from the meta device there is nothing to copy
            return None if graph is None or (graph.is_meta and device.type != "meta") else graph.to(device)

        self._graph, self._last_graph = moved(self._graph), moved(self._last_graph)
        self._copied_table = self._sample_table() if is_copy else None
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        checkpoint.finish_saving(self, destination, prefix, keep_vars)

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
        checkpoint.prepare_loading(self, state_dict, prefix, local_metadata)
        if prefix + "class_embed" in state_dict:
            self.reset_class_neighbors()
            self._last_graph = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def __getstate__(self) -> dict[str, Any]:
        if self.mesh is not None:
            sharded.table.refuse_pickling(self._class_table())
        # Maps of one step, with their graph, and a mere hint: neither copied nor pickled.
        return {**self.__dict__, "_pending_gallery": None, "_last_graph": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pending_gallery = None
        if self.mesh is not None:
            self._graph = None  # no sample tells, alike on all ranks, whether the copy is averaged or loaded later
        self._copied_table = self._sample_table()
