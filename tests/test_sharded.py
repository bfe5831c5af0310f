"""A class table that is sharded over ranks, against the same table whole on one process that has all batches."""

from __future__ import annotations

import copy
import importlib.util
import os
from functools import partial

import pytest
import torch
from ranks import on_ranks
from sharded_cases import (
    RANKS,
    SIZES,
    SIZES_OF_MESHES,
    C,
    Check,
    Found,
    H,
    K,
    N,
    OnMeshes,
    W,
    assert_no_error,
    batch,
    gradients,
    loss_of,
    make_matcher,
    whole,
)
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from qaconv_triton import (
    ClassMemoryLoss,
    PairwiseMatchingLoss,
    QAConv,
    SoftmaxTripletLoss,
    TripletLoss,
    functional,
    sharded,
)
from qaconv_triton.head import update_running_statistics
from qaconv_triton.losses import batch_hard_hinge
from qaconv_triton.scores import score_maps

CLOSE = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}


class Whole:
    """The same step on one process that has the batches of all ranks; losses are the mean of the ranks' losses."""

    def __init__(self, mesh: DeviceMesh, matcher: QAConv, dtype: torch.dtype) -> None:
        self.ranks, self.rank, self.matcher, self.dtype = mesh.size(), mesh.get_local_rank(), matcher, dtype

    def batches(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        parts = [batch(step, rank, self.dtype) for rank in range(self.ranks)]
        features, labels, visibility = (torch.cat(each) for each in zip(*parts, strict=True))
        return features.detach().requires_grad_(), labels, visibility

    def parts(self, step: int, values: Tensor) -> tuple[Tensor, ...]:
        return values.split(SIZES[step % 3][: self.ranks])

    def own(self, step: int, values: Tensor) -> Tensor:
        return self.parts(step, values)[self.rank]

    def mean_loss(self, step: int, values: Tensor) -> Tensor:
        return sum((loss_of(part) for part in self.parts(step, values)), values.new_zeros(())) / self.ranks


def assert_same_state(matcher: QAConv, expected: QAConv, dtype: torch.dtype, **close: float) -> None:
    close = CLOSE[dtype] | close
    for what in ("named_parameters", "named_buffers"):
        for (name, value), (_, other) in zip(getattr(matcher, what)(), getattr(expected, what)(), strict=True):
            torch.testing.assert_close(whole(value.detach()), other.detach(), **close, msg=lambda m, n=name: n + m)


def assert_same_gradients(matcher: nn.Module, expected: nn.Module, dtype: torch.dtype) -> None:
    close = CLOSE[dtype] | ({"atol": 1e-5} if dtype == torch.float32 else {})  # some are zero but for rounding
    found, wanted = gradients(matcher), gradients(expected)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], **close, msg=lambda m, n=name: n + m)


# --- construction


def check_start(mesh: DeviceMesh) -> dict[str, Tensor]:
    """Each rank makes its own rows; the first one's seed counts. Returns what should not depend on the ranks."""
    count, shape = 700, (3, 2, 1)  # three blocks of seeds
    torch.manual_seed(5 if mesh.get_local_rank() == 0 else 100 + mesh.get_local_rank())
    matcher = QAConv(*shape, count, mesh=mesh)
    table = matcher.class_embed
    assert isinstance(table, DTensor)
    assert isinstance(table, nn.Parameter)
    assert table.shape == (count, *shape)
    assert matcher.num_classes == count
    assert len(table.to_local()) == len(torch.arange(count).chunk(mesh.size())[mesh.get_local_rank()])
    assert table.to_local().is_contiguous(memory_format=torch.channels_last)
    assert 0.9 < float(whole(table.detach()).std()) * 3**0.5 < 1.1
    assert whole(table.detach()).flatten(1).unique(dim=0).shape[0] == count  # no two classes alike
    start = {name: whole(value.detach()).clone() for name, value in matcher.named_parameters()}
    matcher.reset_parameters()
    start["reset"] = whole(table.detach())
    assert not torch.equal(start["reset"], start["class_embed"])
    assert QAConv(C, H, W, N, K, mesh=mesh, dtype=torch.bfloat16).class_embed.to_local().dtype == torch.bfloat16  # type: ignore[union-attr]
    few = QAConv(C, H, W, 2, 1, mesh=mesh)  # shards of one row or none
    assert whole(few.compute_class_neighbors()).tolist() == [[1], [0]]
    return start


# --- scores


def check_scores(mesh: DeviceMesh) -> None:
    """Scores, gradients, running statistics and the graph, by class and by all classes, in both modes of the norms."""
    for dtype in (torch.float64, torch.float32):
        for options in ({}, {"include_self": True, "shared_fc": True}):
            matcher, single = (make_matcher(each, dtype, **options) for each in (mesh, None))
            one = Whole(mesh, single, dtype)
            for step in range(4):
                if step == 3:
                    matcher.eval()
                    single.eval()
                features, labels, visibility = batch(step, one.rank, dtype)
                all_features, all_labels, all_visibility = one.batches(step)
                for by_class in (True, False):
                    matcher.zero_grad()
                    single.zero_grad()
                    features.grad = all_features.grad = None
                    if by_class:
                        found, expected = (
                            each.class_scores(*inputs)
                            for each, inputs in (
                                (matcher, (features, labels, visibility)),
                                (single, (all_features, all_labels, all_visibility)),
                            )
                        )
                        assert torch.equal(found.classes, one.own(step, expected.classes))
                        assert found.num_classes == N
                        values, others = found.values, expected.values
                    else:
                        values, others = matcher(features), single(all_features)
                    torch.testing.assert_close(values, one.own(step, others), **CLOSE[dtype])
                    loss_of(values).backward()
                    one.mean_loss(step, others).backward()
                    assert features.grad is not None
                    assert all_features.grad is not None
                    expected_grad = one.own(step, all_features.grad) * one.ranks  # of the sum of the losses
                    torch.testing.assert_close(features.grad, expected_grad, **CLOSE[dtype])
                    assert_same_gradients(matcher, single, dtype)
                    assert matcher.class_embed.grad.placements == matcher.class_embed.placements  # type: ignore[union-attr]
                    with torch.no_grad():
                        dense = matcher(features, labels=labels) if by_class else matcher(features)
                        other = single(all_features, labels=all_labels) if by_class else single(all_features)
                    torch.testing.assert_close(dense, one.own(step, other), **CLOSE[dtype])
                assert_same_state(matcher, single, dtype)
            assert torch.equal(whole(matcher.class_neighbors), single.class_neighbors)  # type: ignore[arg-type]
            firsts = [buffer.clone() for buffer in matcher.buffers()]
            sharded.table.broadcast_from_first(firsts, mesh)
            assert all(torch.equal(*pair) for pair in zip(firsts, matcher.buffers(), strict=True))  # on all ranks


def check_all_pairs(mesh: DeviceMesh) -> None:
    """Pairs of a batch stay on its rank, but norms are over all ranks; so are the gradients of the loss of both."""
    dtype, step = torch.float64, 2
    matcher, single = (make_matcher(each, dtype, include_self=True) for each in (mesh, None))
    one = Whole(mesh, single, dtype)
    features, labels, _ = batch(step, one.rank, dtype)
    losses = SoftmaxTripletLoss(matcher, background="ignore")(features, labels)
    losses[2].mean().backward()
    all_features, all_labels, _ = one.batches(step)
    class_scores = single.class_scores(all_features, all_labels)
    size, prepared = SIZES[step][0], functional.prepare_maps(all_features, None, dtype)
    index = torch.arange(len(all_labels)).view(-1, size).repeat_interleave(size, dim=0)  # a block for each rank
    pairs, statistics = score_maps(single._head, prepared, prepared, index)
    update_running_statistics(statistics)
    total = torch.zeros((), dtype=dtype)
    for rank, (values, classes, block) in enumerate(
        zip(class_scores.values.split(size), class_scores.classes.split(size), pairs.split(size), strict=True)
    ):
        target = all_labels[rank * size : (rank + 1) * size]
        cross_entropy = values.logsumexp(1) - values.masked_fill(classes != target[:, None], 0.0).sum(1)
        loss = (cross_entropy + batch_hard_hinge(block, target, 1.0)[0].mean()).mean()
        total = total + loss / one.ranks
        if rank == one.rank:
            torch.testing.assert_close(losses[2].mean(), loss, **CLOSE[dtype])
    total.backward()
    assert_same_gradients(matcher, single, dtype)
    assert_same_state(matcher, single, dtype)
    matcher.eval()
    if one.rank == 0:  # matching is a rank's own affair
        single.eval()
        maps = torch.randn(3, C, H, W, dtype=dtype)
        torch.testing.assert_close(matcher.match(maps, maps), single.match(maps, maps), **CLOSE[dtype])
        for norm in (matcher.bn, matcher.logit_bn, single.bn, single.logit_bn):
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        torch.testing.assert_close(matcher.match(maps, maps), single.match(maps, maps), **CLOSE[dtype])


def check_features_without_gradient(mesh: DeviceMesh) -> None:
    """One rank's features need none: the ranks still meet in the backward pass, and the parameters' are the same."""
    results = []
    for needs_grad in (True, mesh.get_local_rank() != 0):
        matcher = make_matcher(mesh, torch.float64, include_self=True)
        features, labels, _ = batch(2, mesh.get_local_rank(), torch.float64)
        features.requires_grad_(needs_grad)
        losses = SoftmaxTripletLoss(matcher)(features, labels)
        (losses[2].mean() + loss_of(matcher(features))).backward()
        results.append((gradients(matcher), features.grad))
    (weights, grad), (other_weights, other_grad) = results
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    assert other_grad is None if mesh.get_local_rank() == 0 else torch.equal(grad, other_grad)


def check_autocast(mesh: DeviceMesh) -> None:
    matcher, single = (make_matcher(each, torch.float32) for each in (mesh, None))
    one = Whole(mesh, single, torch.float32)
    features, labels, visibility = batch(2, one.rank, torch.float32)
    all_features, all_labels, all_visibility = one.batches(2)
    with torch.autocast("cpu", torch.bfloat16):
        found = matcher.class_scores(features, labels, visibility).values
        expected = single.class_scores(all_features, all_labels, all_visibility).values
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, one.own(2, expected), rtol=1e-4, atol=1e-4)
    loss_of(found).backward()
    one.mean_loss(2, expected).backward()
    for name, grad in gradients(matcher).items():  # gradients of probes are sums of bfloat16 values
        torch.testing.assert_close(grad, gradients(single)[name], rtol=3e-2, atol=1e-2, msg=lambda m, n=name: n + m)


def check_kernels(mesh: DeviceMesh) -> None:
    """The graph and the scores by the Triton kernels."""
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        return
    features, labels, visibility = batch(0, mesh.get_local_rank(), torch.float32)
    results = []
    for backend in ("torch", "triton"):
        os.environ["QACONV_TRITON_BACKEND"] = backend
        try:
            matcher = make_matcher(mesh, torch.float32, include_self=True)
            features.grad = None
            scores = matcher.class_scores(features, labels, visibility)
            loss_of(scores.values).backward()
        finally:
            del os.environ["QACONV_TRITON_BACKEND"]
        results.append((scores.classes, scores.values.detach(), features.grad, gradients(matcher)))
    (classes, values, grad, weights), (other_classes, other_values, other_grad, other_weights) = results
    assert torch.equal(classes, other_classes)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close((values, grad), (other_values, other_grad), **close)
    for name, value in weights.items():
        torch.testing.assert_close(value, other_weights[name], **close, msg=lambda m, n=name: n + m)


def check_recomputation(mesh: DeviceMesh) -> None:
    """Under activation checkpointing the ranks meet in the backward pass again; statistics count once."""
    dtype, results = torch.float64, []
    features, labels, visibility = batch(0, mesh.get_local_rank(), dtype)
    for run in (lambda function, *inputs: function(*inputs), partial(torch_checkpoint, use_reentrant=False)):
        matcher = make_matcher(mesh, dtype)
        features.grad = None
        matcher.compute_class_neighbors()
        loss_of(run(lambda maps, its=matcher: its.class_scores(maps, labels, visibility).values, features)).backward()
        results.append((features.grad, gradients(matcher), matcher))
    (grad, weights, matcher), (other_grad, other_weights, other) = results
    assert torch.equal(grad, other_grad)
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    for buffer, other_buffer in zip(matcher.buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, other_buffer)


def check_empty(mesh: DeviceMesh) -> None:
    """No rank has a sample: empty results of the right shape, and gradients of zero."""
    matcher = make_matcher(mesh, torch.float32)
    features, labels = torch.zeros(0, C, H, W, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    assert matcher.class_scores(features, labels).values.shape == (0, K)
    assert matcher(features).shape == (0, N)
    matcher(features, labels=labels).sum().backward()
    assert all((grad == 0).all() for grad in gradients(matcher).values())
    assert matcher.bn.num_batches_tracked == 0
    matcher.zero_grad()
    loss = SoftmaxTripletLoss(matcher)(features, labels)[2].sum()
    loss.backward()
    assert loss == 0
    assert all((grad == 0).all() for grad in gradients(matcher).values())


def check_twice(mesh: DeviceMesh) -> None:
    """The same bits each time, also where a probe has several rows on a rank; a second derivative is refused."""
    count = 40
    matcher = QAConv(C, H, W, count, 12, mesh=mesh)
    matcher.class_neighbors = (torch.arange(count).unsqueeze(1) + torch.arange(1, 13)) % count
    generator = torch.Generator().manual_seed(mesh.get_local_rank())
    labels, grads = torch.randint(count, (16,), generator=generator), []
    features = torch.randn(16, C, H, W, generator=generator, requires_grad=True)
    for _ in range(2):
        values = matcher.class_scores(features, labels).values
        grad, of_values = torch.autograd.grad(loss_of(values), (features, values))
        grads.append(grad)
    assert torch.equal(*grads)
    alone = values.detach().requires_grad_()
    assert torch.equal(of_values, torch.autograd.grad(loss_of(alone), alone)[0])  # of this rank's loss, undivided
    if mesh.size() == 1 or torch.__version__.startswith("2.8."):  # whose DTensor refuses the first one already
        return
    matcher.eval()
    weight = matcher.fc.weight
    (grad,) = torch.autograd.grad(loss_of(matcher.class_scores(features, labels).values), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        grad.square().sum().backward()


def check_nan(mesh: DeviceMesh) -> None:
    """In evaluation NaN stays in the scores of its own sample."""
    matcher = make_matcher(mesh, torch.float32).eval()
    features, labels, _ = batch(2, mesh.get_local_rank(), torch.float32)
    features = features.detach()
    if mesh.get_local_rank() == 0:
        features[0, 0, 0, 0] = torch.nan
    scores = matcher.class_scores(features, labels).values
    expected = torch.zeros(len(labels), dtype=torch.bool)
    expected[0] = mesh.get_local_rank() == 0
    assert torch.equal(scores.isnan().any(1), expected)


def check_steps(mesh: DeviceMesh) -> None:
    """Twenty steps with a backbone under DDP, ranks with batches of different sizes and with none.

    Scores do not depend on the scale of what `logit_bn` normalises, so that some gradients are zero but for rounding.
    Adam makes steps of full size of them in fp32, unless its epsilon is far above the rounding.
    """
    for dtype, kind in (
        (torch.float64, partial(torch.optim.AdamW, lr=1e-2)),
        (torch.float32, partial(torch.optim.AdamW, lr=1e-2, eps=1e-2)),
        (torch.float32, partial(torch.optim.SGD, lr=1e-2, momentum=0.9)),
    ):
        matcher, single = (make_matcher(each, dtype, include_self=True) for each in (mesh, None))
        one = Whole(mesh, single, dtype)
        torch.manual_seed(3)
        backbone = nn.Conv2d(C, C, 1, dtype=dtype)
        twin = copy.deepcopy(backbone)
        model = DistributedDataParallel(backbone, process_group=mesh.get_group())
        optimizer = kind([*backbone.parameters(), *matcher.parameters()])
        other = kind([*twin.parameters(), *single.parameters()])
        for step in range(20):
            if step % 5 == 0:
                matcher.on_epoch_start()
                single.on_epoch_start()
            features, labels, _ = batch(step, one.rank, dtype)
            loss = loss_of(matcher.class_scores(model(features.detach()), labels).values)
            all_features, all_labels, _ = one.batches(step)
            expected = one.mean_loss(step, single.class_scores(twin(all_features.detach()), all_labels).values)
            mean = loss.detach().clone()
            distributed.all_reduce(mean, group=mesh.get_group())
            torch.testing.assert_close(mean / one.ranks, expected.detach(), **CLOSE[dtype])
            for each, its_loss in ((optimizer, loss), (other, expected)):
                each.zero_grad()
                its_loss.backward()
                each.step()
            assert torch.equal(whole(matcher.class_neighbors), single.class_neighbors)  # type: ignore[arg-type]
        assert_same_state(matcher, single, dtype, rtol=1e-7 if dtype == torch.float64 else 1e-5)
        for value, wanted in zip(backbone.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


def check_fsdp(mesh: DeviceMesh) -> None:
    """A backbone under FSDP2 beside the sharded table."""
    dtype = torch.float64
    matcher, single = (make_matcher(each, dtype) for each in (mesh, None))
    one = Whole(mesh, single, dtype)
    torch.manual_seed(3)
    backbone = nn.Conv2d(C, C, 1, dtype=dtype)
    twin = copy.deepcopy(backbone)
    fully_shard(backbone, mesh=mesh)
    features, labels, _ = batch(2, one.rank, dtype)
    all_features, all_labels, _ = one.batches(2)
    loss_of(matcher.class_scores(backbone(features.detach()), labels).values).backward()
    one.mean_loss(2, single.class_scores(twin(all_features.detach()), all_labels).values).backward()
    for trained, expected in ((matcher, single), (backbone, twin)):
        assert_same_gradients(trained, expected, dtype)


# --- errors


def check_arguments(mesh: DeviceMesh) -> None:
    with pytest.raises(TypeError, match=r"mesh: expected a .*DeviceMesh, got str"):
        QAConv(C, H, W, N, K, mesh="cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no class table to shard"):
        QAConv(C, H, W, mesh=mesh)
    with pytest.raises(ValueError, match="sparse_grad=True needs a whole one"):
        QAConv(C, H, W, N, K, mesh=mesh, sparse_grad=True)
    with pytest.raises(ValueError, match="the mesh is of cpu devices, got 'meta'"):
        QAConv(C, H, W, N, K, mesh=mesh, device="meta")
    with pytest.raises(ValueError, match="one dimension, got 2"):
        QAConv(C, H, W, N, K, mesh=DeviceMesh("cpu", [[distributed.get_rank()]], _init_backend=False))
    with pytest.raises(ValueError, match="the matcher's class table is sharded over a mesh"):
        ClassMemoryLoss(make_matcher(mesh, torch.float32), N, C, H, W)


def check_errors(mesh: DeviceMesh) -> None:
    """What is wrong on one rank raises on all; the module is as before."""
    matcher, rank = make_matcher(mesh, torch.float32), mesh.get_local_rank()
    last = mesh.size() - 1
    features, labels, _ = batch(2, rank, torch.float32)
    matcher.class_scores(features, labels)
    state = {name: whole(value).clone() for name, value in matcher.state_dict().items()}
    wrong_labels = labels + N if rank == last else labels
    kind, text = (
        (IndexError, "labels") if rank == last else (RuntimeError, f"rank {last} of the mesh failed: IndexError")
    )
    with pytest.raises(kind, match=text):
        matcher.class_scores(features, wrong_labels)
    kind, text = (
        (ValueError, "prob_fea") if rank == last else (RuntimeError, f"rank {last} of the mesh failed: ValueError")
    )
    with pytest.raises(kind, match=text):
        matcher(features[:, 1:] if rank == last else features)
    for loss, its_kind, maps, targets in (
        (SoftmaxTripletLoss, IndexError, features, wrong_labels),
        (TripletLoss, TypeError, features, labels.float() if rank == last else labels),
        (TripletLoss, ValueError, features[..., 1:] if rank == last else features, labels),
        (PairwiseMatchingLoss, ValueError, features, labels[1:] if rank == last else labels),
    ):
        kind = its_kind if rank == last or mesh.size() == 1 else RuntimeError
        with pytest.raises(kind, match="" if rank == last else f"rank {last} of the mesh failed: {its_kind.__name__}"):
            loss(matcher)(maps, targets)
    matcher.bn.eval()
    matcher.logit_bn.eval()  # no statistics are summed then, but gradients are
    kind = TypeError if rank == last else RuntimeError
    with pytest.raises(kind, match="" if rank == last else f"rank {last} of the mesh failed: TypeError"):
        TripletLoss(matcher)(features, labels.float() if rank == last else labels)[0].mean().backward()
    matcher.train()
    graph = whole(matcher.class_neighbors)  # type: ignore[arg-type]
    kind, text = (IndexError, "class_neigh") if rank == 0 else (RuntimeError, "rank 0 of the mesh failed: IndexError")
    with pytest.raises(kind, match=text):
        matcher.class_neighbors = graph + N if rank == 0 else graph
    for name, value in matcher.state_dict().items():
        assert torch.equal(whole(value), state[name])
    assert torch.equal(whole(matcher.class_neighbors), graph)  # type: ignore[arg-type]
    matcher.class_scores(features, labels)


def check_difference(mesh: DeviceMesh) -> None:
    """What has to be alike on all ranks and is not raises on all; a graph that some have lost is searched again."""
    matcher, rank = make_matcher(mesh, torch.float32), mesh.get_local_rank()
    is_other = rank == mesh.size() - 1
    features, labels, _ = batch(2, rank, torch.float32)
    expected = matcher.class_scores(features, labels)
    graph = whole(matcher.class_neighbors)  # type: ignore[arg-type]
    if is_other:
        matcher.reset_class_neighbors()
    assert torch.equal(matcher.class_scores(features, labels).classes, expected.classes)
    assert torch.equal(whole(matcher.class_neighbors), graph)  # type: ignore[arg-type]
    count = 0 if is_other else 2  # maps of an empty batch may be of another dtype
    maps = features[:count].to(torch.float32 if is_other else torch.bfloat16).detach().requires_grad_()
    values = matcher.class_scores(maps, labels[:count]).values
    assert values.dtype == torch.float32
    loss_of(values).backward()
    assert maps.grad is not None
    if mesh.size() == 1:
        return
    maps, loss = features.bfloat16() if is_other else features, TripletLoss(matcher)
    for call in (lambda: matcher.class_scores(maps, labels), lambda: matcher(maps)):
        with pytest.raises(
            RuntimeError, match=r"rank 0 has maps in torch.float32; .*rank \d has maps in torch.bfloat16"
        ):
            call()
    for call in (
        lambda: matcher.class_scores(features, labels),
        lambda: matcher(features),
        lambda: loss(features, labels),
    ):
        with (
            torch.set_grad_enabled(not is_other),
            pytest.raises(RuntimeError, match=r"rank 0 has .*gradients enabled.*rank \d has .*gradients disabled"),
        ):
            call()
    matcher.train(not is_other)
    with pytest.raises(RuntimeError, match=r"rank 0 has batch statistics .*rank \d has running statistics in bn"):
        matcher.class_scores(features, labels)
    matcher.train().k_nearest = K - is_other
    with pytest.raises(RuntimeError, match=rf"rank 0 has .*k_nearest={K}.*k_nearest={K - 1}"):
        matcher.class_scores(features, labels)


CHECKS: list[Check] = [
    check_start,
    check_scores,
    check_all_pairs,
    check_features_without_gradient,
    check_autocast,
    check_kernels,
    check_recomputation,
    check_empty,
    check_twice,
    check_nan,
    check_steps,
    check_fsdp,
    check_arguments,
    check_errors,
    check_difference,
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return on_ranks(OnMeshes(CHECKS), tmp_path_factory.mktemp("ranks"), RANKS)


def test_gradients_of_repeated_rows_are_summed_in_fp32() -> None:
    values = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    counts, grad = torch.tensor([3, 0, 1]), torch.tensor([256.0, 1.0, 1.0, 5.0], dtype=torch.bfloat16)
    rows = sharded.scores._Repeated.apply(values, torch.tensor([3, 0, 1]), counts, 1)  # type: ignore[no-untyped-call]
    rows.backward(grad.unsqueeze(1).expand(4, 2))
    assert values.grad is not None
    assert values.grad[:, 0].tolist() == [0.0, 5.0, 0.0, 258.0]  # bfloat16 has no 257


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES_OF_MESHES)
@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_sharded(found: list[Found], name: str, size: int) -> None:
    assert_no_error(found, name, size)


@pytest.mark.slow
def test_initial_values_do_not_depend_on_the_number_of_ranks(found: list[Found]) -> None:
    expected = found[-1][1, "check_start"]
    for size in SIZES_OF_MESHES:
        for of_rank in found[RANKS - size :]:
            start = of_rank[size, "check_start"]
            assert all(torch.equal(value, start[name]) for name, value in expected.items())
