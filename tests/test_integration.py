"""The library inside torch: op checks, compile, autocast, copies, loaders, training, repeats; and without triton."""

from __future__ import annotations

import copy
import doctest
import importlib
import io
import pickle
import pkgutil
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import qaconv_triton
from qaconv_triton import GraphSampler, PairwiseMatchingLoss, QAConv, SoftmaxTripletLoss, TripletLoss, functional, ops

C, H, W, N, K = 5, 2, 3, 8, 3
S = H * W
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
LABELS = [0, 0, 3, 3, 7, 7]
B = len(LABELS)


def build(dtype: torch.dtype = torch.float32, **options: Any) -> QAConv:
    torch.manual_seed(0)
    matcher = QAConv(C, H, W, **{"num_classes": N, "k_nearest": K, "include_self": True, **options}).to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in (*matcher.bn.parameters(), *matcher.fc.parameters(), *matcher.logit_bn.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return matcher


def maps(count: int = B, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, C, H, W, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ids(values: list[int]) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def step(loss: SoftmaxTripletLoss, feature: Tensor, target: Tensor, veil: Tensor | None = None) -> dict[str, Tensor]:
    """Run one training step's forward and backward; everything that it makes or changes."""
    feature = feature.detach().clone().requires_grad_()
    loss.zero_grad()
    outputs = loss(feature, target, veil)
    outputs[2].mean().backward()
    assert feature.grad is not None
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)} | {"feature": feature.grad}
    found |= {
        f"gradient of {name}": parameter.grad.to_dense()
        for name, parameter in loss.named_parameters()
        if parameter.grad is not None
    }
    return found | {name: buffer.clone() for name, buffer in loss.named_buffers()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    assert len(expected) > 10
    for name, value in expected.items():
        atol = tolerance * max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- the ops ----------------------------------------------------------------------------------------------------------


EVERY_CHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def correlation_inputs(kind: str, dtype: torch.dtype) -> tuple[Any, ...]:
    probe, gallery = (F.normalize(maps(count, seed), dim=1).to(dtype) for count, seed in ((4, 1), (5, 2)))
    index, group = ids([[0, 3], [4, 1], [0, 3], [2, 2]]), ids([1, 4, 1, 0])
    return {
        "all pairs": (probe, gallery, None, None, False, False),
        "all raw classes": (probe, gallery * 3, None, None, True, False),
        "index": (probe, gallery, index, None, False, False),
        "grouped raw classes": (probe, gallery * 3, index, group, True, False),
        "classes in another dtype": (probe, gallery.float(), index, group, True, False),
        "channels last": (
            probe.contiguous(memory_format=torch.channels_last),
            gallery.contiguous(memory_format=torch.channels_last),
            index,
            None,
            True,
            False,
        ),
        "not contiguous": (probe.flip(0).mT.contiguous().mT, gallery[::2], None, None, False, False),
        "no probes": (probe[:0], gallery, index[:0], group[:0], True, False),
        "no gallery": (probe, gallery[:0], None, None, False, False),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["all pairs", "all raw classes", "index", "grouped raw classes", "classes in another dtype", "channels last",
     "not contiguous", "no probes", "no gallery"],
)  # fmt: skip
def test_max_correlation_op(backend: str, kind: str) -> None:
    probe, gallery, *others = correlation_inputs(kind, torch.float32)
    whole = kind in ("all pairs", "grouped raw classes", "no probes")
    torch.library.opcheck(
        ops.max_correlation,
        (probe.requires_grad_(), gallery.requires_grad_(), *others),
        test_utils=EVERY_CHECK if whole else EVERY_CHECK[:3],  # the last one takes seconds
    )


@pytest.mark.parametrize("gradient", ["probe", "gallery", "none"])
def test_max_correlation_op_with_fewer_gradients(gradient: str) -> None:
    probe, gallery, *others = correlation_inputs("grouped raw classes", torch.float32)
    probe.requires_grad_(gradient == "probe")
    gallery.requires_grad_(gradient == "gallery")
    torch.library.opcheck(ops.max_correlation, (probe, gallery, *others))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_max_correlation_op_in_every_dtype(backend: str, dtype: torch.dtype) -> None:
    for kind in ("all pairs", "grouped raw classes", "classes in another dtype"):
        probe, gallery, *others = correlation_inputs(kind, dtype)
        torch.library.opcheck(
            ops.max_correlation,
            (probe.requires_grad_(), gallery.requires_grad_(), *others),
            test_utils=EVERY_CHECK[:3],
        )


@pytest.mark.parametrize(
    ("kind", "needs", "dtype"),
    [
        ("all pairs", (True, True), torch.float32),
        ("grouped raw classes", (True, True), torch.float32),
        ("grouped raw classes", (True, False), torch.float64),
        ("grouped raw classes", (False, True), torch.float32),
        ("classes in another dtype", (True, True), torch.bfloat16),
        ("no probes", (True, True), torch.float32),
    ],
)
def test_max_correlation_backward_op(backend: str, kind: str, needs: tuple[bool, bool], dtype: torch.dtype) -> None:
    probe, gallery, index, group, *options = correlation_inputs(kind, dtype)
    saved = ops.max_correlation(probe, gallery, index, group, *options)
    grad = torch.randn_like(saved[0])
    for rows in (None,) if index is None else (None, index.unique()):
        torch.library.opcheck(ops.max_correlation_backward, (grad, *saved, probe, gallery, index, group, rows, *needs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cosine_topk_op(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(count, 7, generator=generator).to(DEVICE, dtype) for count in (4, 6))
    for arguments in (
        (queries, keys, 2),
        (keys, None, 5),
        (queries.T.contiguous().T, keys[::2], 3),
        (queries[:0], keys, 1),
    ):
        torch.library.opcheck(ops.cosine_topk, (*arguments, None, None, None, None))


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nothing compiled earlier is used: not by this process, nor by one that knew the ops as they were."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_compiles(backend: str, tolerance: float, **options: Any) -> None:
    loss = SoftmaxTripletLoss(build(**options))
    loss.matcher.compute_class_neighbors()
    twin = copy.deepcopy(loss)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    veil = torch.rand(B, 1, H, W, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for seed, labels in ((1, LABELS), (2, [1, 1, 0, 0, 5, 5])):  # again: same graph, moved statistics
        actual = step(compiled, maps(seed=seed), ids(labels), veil)
        expected = step(loss, maps(seed=seed), ids(labels), veil)
        actual = {name.replace("_orig_mod.", ""): value for name, value in actual.items()}
        assert_same(actual, expected, tolerance)
    assert twin.matcher.bn.num_batches_tracked == 4
    assert float(expected["output 2"].std()) > 1e-2


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_training_step(backend: str) -> None:
    assert_compiles("aot_eager", 1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_training_step_without_the_own_class() -> None:
    assert_compiles("aot_eager", 1e-5, include_self=False)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_training_step_by_inductor() -> None:
    assert_compiles("inductor", 1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_batches_of_other_sizes() -> None:
    loss = SoftmaxTripletLoss(build())
    loss.matcher.compute_class_neighbors()
    twin = copy.deepcopy(loss)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (6, 4):
        target = ids(LABELS[:count])
        actual = step(compiled, maps(count), target)
        actual = {name.replace("_orig_mod.", ""): value for name, value in actual.items()}
        assert_same(actual, step(loss, maps(count), target))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_class_path_does_not_read_labels() -> None:
    """No value is looked at in a graph: invalid labels give rows of NaN there, on the CPU too."""
    matcher = build().eval()
    matcher.compute_class_neighbors()
    compiled = torch.compile(matcher, fullgraph=True, backend="aot_eager")
    expected = matcher(maps(3), labels=ids([0, 3, 7]))
    actual = compiled(maps(3), labels=ids([0, N, 7]))
    assert actual[1].isnan().all()
    torch.testing.assert_close(actual[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_graph_is_built_in_a_compiled_step() -> None:
    """Without fullgraph the lazy graph works too: it is computed outside of the compiled code."""
    matcher, expected = build(), build()
    compiled = torch.compile(matcher, backend="aot_eager")
    actual = compiled(maps(), labels=ids(LABELS))
    torch.testing.assert_close(actual, expected(maps(), labels=ids(LABELS)), rtol=1e-5, atol=1e-5)
    assert torch.equal(matcher.class_neighbors, expected.class_neighbors)  # type: ignore[arg-type]


# --- autocast ---------------------------------------------------------------------------------------------------------


class SeenDtypes(TorchDispatchMode):
    """The dtypes of the probes that reach the correlation."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.qaconv_triton.max_correlation.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


CALLS: dict[str, Callable[[QAConv, Tensor], Tensor]] = {
    "classes": lambda matcher, feature: matcher.class_scores(feature, ids(LABELS)).values,
    "dense": lambda matcher, feature: matcher(feature, labels=ids(LABELS)),
    "every class": lambda matcher, feature: matcher(feature),
    "gallery": lambda matcher, feature: matcher(feature, maps(4, 9)),
    "same": lambda matcher, feature: matcher(feature, "same"),
}


@pytest.mark.parametrize("kind", CALLS)
def test_autocast(backend: str, kind: str) -> None:
    matcher = build().eval()
    results = []
    for enabled in (True, False):
        matcher.zero_grad()
        feature = maps().requires_grad_()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            scores = CALLS[kind](matcher, feature)
            weight = torch.randn(scores.shape, generator=torch.Generator().manual_seed(4)).to(DEVICE)
            total = (scores * weight).sum()
        assert scores.dtype == torch.float32
        total.backward()
        gradients = {name: parameter.grad for name, parameter in matcher.named_parameters() if "logit" not in name}
        results.append((scores.detach(), {"feature": feature.grad, **gradients}))
    (actual, actual_gradients), (expected, expected_gradients) = results
    assert not torch.equal(actual, expected)
    assert float((actual - expected).norm()) < 0.03 * float((expected - expected.mean()).norm())
    for name, gradient in expected_gradients.items():
        found = actual_gradients[name]
        if gradient is None:
            assert found is None
            continue
        assert found is not None
        assert found.dtype == torch.float32
        assert float(F.cosine_similarity(found.flatten(), gradient.flatten(), dim=0)) > 0.999, name
        assert float(found.norm()) == pytest.approx(float(gradient.norm()), rel=0.03)


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_dtype_of_the_correlation(kind: str, dtype: torch.dtype) -> None:
    matcher = build()
    with SeenDtypes() as seen:
        with torch.autocast(DEVICE.type, dtype):
            CALLS[kind](matcher, maps())
        CALLS[kind](matcher, maps())
    assert seen.dtypes == [dtype, torch.float32]


def test_autocast_leaves_the_graph_exact(backend: str) -> None:
    table = torch.randn(60, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = functional.class_neighbors(table, 20, return_similarities=True)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        actual = functional.class_neighbors(table, 20, return_similarities=True)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_autocast_around_the_backward_pass_too(backend: str) -> None:
    gradients = []
    for enabled in (True, False):
        matcher, feature = build(), maps().requires_grad_()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = matcher(feature, labels=ids(LABELS)).square().sum()
            if enabled:
                loss.backward()
        if not enabled:
            loss.backward()
        assert matcher.class_embed is not None
        gradients.append((feature.grad, matcher.class_embed.grad))
    for actual, expected in zip(*gradients, strict=True):
        assert actual is not None
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_autocast_of_a_whole_training_step() -> None:
    loss, twin = (SoftmaxTripletLoss(build()) for _ in range(2))
    expected = step(loss, maps(), ids(LABELS))
    feature = maps().requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs = twin(feature, ids(LABELS))
    outputs[2].mean().backward()
    assert all(output.dtype == torch.float32 for output in outputs)
    assert feature.grad is not None
    assert float(F.cosine_similarity(feature.grad.flatten(), expected["feature"].flatten(), dim=0)) > 0.99
    for name, buffer in twin.named_buffers():
        assert buffer.dtype == expected[name].dtype
        torch.testing.assert_close(buffer, expected[name], rtol=2e-2, atol=2e-2)


def test_autocast_leaves_double_alone() -> None:
    matcher = build(torch.float64).eval()
    feature = maps(dtype=torch.float64)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        scores = matcher(feature, "same")
    assert scores.dtype == torch.float64
    assert torch.equal(scores, matcher(feature, "same"))


# --- copies and files -------------------------------------------------------------------------------------------------


def through_pickle(loss: SoftmaxTripletLoss) -> SoftmaxTripletLoss:
    loaded = pickle.loads(pickle.dumps(loss))
    assert isinstance(loaded, SoftmaxTripletLoss)
    return loaded


def through_file(loss: SoftmaxTripletLoss) -> SoftmaxTripletLoss:
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, SoftmaxTripletLoss)
    return loaded


def through_state_dict(loss: SoftmaxTripletLoss) -> SoftmaxTripletLoss:
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    other = SoftmaxTripletLoss(QAConv(C, H, W, num_classes=N, k_nearest=K, include_self=True).to(DEVICE))
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def through_clone(loss: SoftmaxTripletLoss) -> SoftmaxTripletLoss:
    return SoftmaxTripletLoss(loss.matcher.clone())


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file, through_state_dict, through_clone])
def test_a_copy_goes_on_alike_and_on_its_own(copied: Callable[[SoftmaxTripletLoss], SoftmaxTripletLoss]) -> None:
    loss = SoftmaxTripletLoss(build())
    step(loss, maps(), ids(LABELS))
    graph = loss.matcher.class_neighbors
    twin = copied(loss)
    if copied is through_state_dict:
        assert twin.matcher.class_neighbors is None
    else:
        assert twin.matcher.class_neighbors is not graph
        assert torch.equal(twin.matcher.class_neighbors, graph)  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    actual = step(twin, maps(seed=2), ids(LABELS))
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())
    expected = step(loss, maps(seed=2), ids(LABELS))
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())
    for parameter, own in zip(twin.parameters(), loss.parameters(), strict=True):
        assert parameter.data_ptr() != own.data_ptr()
        assert parameter.requires_grad
    assert type(twin.matcher) is QAConv


def test_clone_keeps_modes_options_and_dtype_but_no_kernel() -> None:
    matcher = build(torch.float64, sparse_grad=True, k_nearest=4)
    matcher.bn.eval()
    matcher.make_kernel(maps(2, dtype=torch.float64).requires_grad_() * 2)
    for twin in (matcher.clone(), copy.deepcopy(matcher), pickle.loads(pickle.dumps(matcher))):
        assert (twin.training, twin.bn.training, twin.logit_bn.training) == (True, False, True)
        assert (twin.sparse_grad, twin.include_self, twin.k_nearest, twin.num_classes) == (True, True, 4, N)
        assert twin.fc.weight.dtype == torch.float64
        assert str(twin) == str(matcher)
        assert twin(maps(dtype=torch.float64)).shape == (B, N)  # the kernel of a step is no part of the matcher
    assert matcher(maps(dtype=torch.float64)).shape == (B, 2)


def test_graph_goes_with_the_module_to_a_device() -> None:
    matcher = build()
    matcher.compute_class_neighbors()
    assert matcher.to("meta").class_neighbors.device.type == "meta"  # type: ignore[union-attr]


# --- training ---------------------------------------------------------------------------------------------------------


def dataset() -> tuple[TensorDataset, Tensor]:
    """Noisy views of one image per class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N).repeat_interleave(6)
    images = torch.randn(N, 3, 2 * H, 2 * W, generator=generator)[labels]
    return TensorDataset(images + 0.7 * torch.randn(images.shape, generator=generator), labels), labels


def backbone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, C, 3, stride=2, padding=1)).to(DEVICE)


def test_loader_takes_the_graph_sampler() -> None:
    data, labels = dataset()
    matcher = build()
    sampler = GraphSampler(labels, matcher.compute_class_neighbors(), batch_size=6, num_instances=2, seed=1)
    loader = DataLoader(data, batch_sampler=sampler)
    assert len(loader) == N
    batches = [target for _, target in loader]
    assert sorted(int(target[0]) for target in batches) == list(range(N))
    graph = matcher.class_neighbors
    assert graph is not None
    for target in batches:
        anchor = int(target[0])
        assert target[::2].tolist() == target[1::2].tolist() == [anchor, *graph[anchor, :2].tolist()]


def train(seed: int = 0, sparse_grad: bool = False, epochs: int = 4) -> tuple[list[float], dict[str, Tensor]]:
    """Train as a user would: the graph and its batches anew in every epoch."""
    torch.manual_seed(seed)
    data, labels = dataset()
    model = backbone()
    matcher = QAConv(C, H, W, num_classes=N, k_nearest=K, include_self=True, sparse_grad=sparse_grad).to(DEVICE)
    loss = SoftmaxTripletLoss(matcher)
    dense = [parameter for parameter in loss.parameters() if parameter is not matcher.class_embed]
    assert matcher.class_embed is not None
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam([*model.parameters(), *dense], lr=1e-2)]
    table_optimizer = torch.optim.SparseAdam if sparse_grad else torch.optim.Adam
    optimizers.append(table_optimizer([matcher.class_embed], lr=1e-2))
    sampler = GraphSampler(labels, matcher.compute_class_neighbors, batch_size=8, num_instances=2, seed=seed)
    losses = []
    for _ in range(epochs):
        matcher.on_epoch_start()
        for image, target in DataLoader(data, batch_sampler=sampler):
            total = loss(model(image.to(DEVICE)), target.to(DEVICE))[2].mean()
            for optimizer in optimizers:
                optimizer.zero_grad()
            total.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(float(total.detach()))
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    return losses, state | {f"loss.{name}": value for name, value in loss.state_dict().items()}


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_training_lowers_the_loss(sparse_grad: bool) -> None:
    losses, _ = train(sparse_grad=sparse_grad, epochs=6)
    first, last = sum(losses[:N]) / N, sum(losses[-N:]) / N
    assert last < 0.6 * first, losses


def test_a_whole_training_repeats_bit_by_bit() -> None:
    runs = [train(epochs=2) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    assert runs[0][1].keys() == runs[1][1].keys()
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
    assert train(seed=1, epochs=1)[0] != runs[0][0][:N]


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_a_training_step_repeats_bit_by_bit(backend: str, sparse_grad: bool) -> None:
    target = ids([3, 3, 3, 0, 0, 7])  # shared neighbours: gradients meet in the same rows
    start = SoftmaxTripletLoss(build(sparse_grad=sparse_grad))
    runs = [step(copy.deepcopy(start), maps(), target) for _ in range(2)]
    assert runs[0]["gradient of matcher.class_embed"].abs().max() > 1e-3
    for run in runs[1:]:
        assert all(torch.equal(value, run[name]) for name, value in runs[0].items())


@pytest.mark.parametrize("make", [PairwiseMatchingLoss, TripletLoss])
def test_pair_losses_repeat_bit_by_bit(backend: str, make: Callable[[QAConv], nn.Module]) -> None:
    runs = []
    for _ in range(2):
        loss, feature = make(build()), maps().requires_grad_()
        value, accuracy = loss(feature, ids(LABELS))
        value.mean().backward()
        assert feature.grad is not None
        runs.append((value, accuracy, feature.grad))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    assert runs[0][2].abs().max() > 0


# --- the package ------------------------------------------------------------------------------------------------------


def test_works_without_triton() -> None:
    script = """
        import importlib.abc, os, sys

        class NoTriton(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "triton":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, NoTriton())
        os.environ.pop("QACONV_TRITON_BACKEND", None)
        import torch
        from qaconv_triton import GraphSampler, QAConv, SoftmaxTripletLoss, functional

        matcher = QAConv(5, 2, 3, num_classes=8, k_nearest=3)
        feature, target = torch.randn(4, 5, 2, 3, requires_grad=True), torch.tensor([0, 0, 3, 3])
        SoftmaxTripletLoss(matcher)(feature, target)[2].mean().backward()
        assert feature.grad.abs().max() > 0 and matcher.class_embed.grad.abs().max() > 0
        assert matcher.match(feature.detach(), feature.detach()).shape == (4, 4)
        assert functional.topk_cosine(torch.eye(3), torch.eye(3), 2)[1][:, 0].tolist() == [0, 1, 2]
        assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
        os.environ["QACONV_TRITON_BACKEND"] = "triton"
        try:
            matcher(feature, "same")
        except ModuleNotFoundError as error:
            print("no", error.name)
    """
    command = [sys.executable, "-W", "error::UserWarning:qaconv_triton", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "no triton"


MODULES = ["qaconv_triton"] + [
    f"qaconv_triton.{module.name}" for module in pkgutil.iter_modules(qaconv_triton.__path__) if not module.ispkg
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    names = {item: getattr(qaconv_triton, item) for item in qaconv_triton.__all__}  # what a reader imports
    result = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch, **names})
    assert result.failed == 0


def test_public_classes_and_functions_have_examples() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    public: list[Any] = [getattr(qaconv_triton, name) for name in qaconv_triton.__all__ if name != "functional"]
    public += [functional.class_neighbors, functional.topk_cosine, functional.max_correlation]
    for item in public:
        assert sum(len(test.examples) for test in finder.find(item)) > 0, item
