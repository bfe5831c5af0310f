"""The class graph from scores of random images: which images, which classes, and what is left as it was."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from exact import exact_vectors
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from qaconv_triton import GraphSampler, QAConv, reference, sample_class_graph, sample_graph

C, H, W = 8, 2, 2
COUNTS = [3, 1, 4, 2, 5, 1, 2]  # samples of each class
N = len(COUNTS)
LABELS = torch.tensor([4, 2, 0, 6, 4, 3, 2, 0, 4, 5, 2, 4, 1, 3, 0, 6, 2, 4])


class Images(Dataset[Tensor]):
    """Noisy views of one image per class; `asked` lists the samples that were read."""

    def __init__(self, noise: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(0)
        of_class = torch.randn(N, 3, 2 * H, 2 * W, generator=generator)[LABELS]
        self.images = of_class + noise * torch.randn(of_class.shape, generator=generator)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> Tensor:
        self.asked.append(index)
        return self.images[index]


def backbone() -> nn.Sequential:
    """In training mode but for the second convolution; its norm has seen a batch."""
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, C, 2, stride=2)
    )
    module(Images().images)
    module[4].eval()
    return module


def matcher(**options: Any) -> QAConv:
    """A matcher whose every parameter and statistic counts."""
    module = QAConv(C, H, W, **options)
    for name, parameter in module.named_parameters():
        if name != "class_embed":
            nn.init.uniform_(parameter, 0.5, 1.5)
    module(torch.randn(6, C, H, W), "same")
    return module


def expected_scores(module: nn.Module, head: QAConv, images: Images, per_class: int) -> Tensor:
    """All scores of the classes by the images that were read, in fp64: `[N, N]`, -inf for a class with itself."""
    module, head = copy.deepcopy(module).double().eval(), copy.deepcopy(head).double().eval()
    assert len(images.asked) == len(set(images.asked))
    maps = torch.zeros(N, C, H, W, dtype=torch.float64)
    for label in range(N):
        mine = [index for index in images.asked if LABELS[index] == label]
        assert len(mine) == min(per_class, COUNTS[label])
        maps[label] = module(images.images[mine].double()).mean(0)
    prepared = reference.normalize(maps.flatten(2).mT)
    pooled = reference.max_correlation(prepared, prepared)
    return reference.pair_scores(pooled, head.bn, head.fc, head.logit_bn).detach().fill_diagonal_(-torch.inf)


def assert_best(graph: Tensor, scores: Tensor, k: int, tolerance: float) -> None:
    """The graph names the k best of each row in order, but for differences of `tolerance` times the row's spread."""
    assert graph.dtype == torch.int64
    assert graph.device.type == "cpu"
    assert graph.shape == (N, k)
    assert all(len(set(row)) == k for row in graph.tolist())
    spread = scores.amax(1) - scores.masked_fill(scores == -torch.inf, torch.inf).amin(1)
    assert spread.min() > 0.1
    difference = scores.gather(1, graph) - scores.topk(k, dim=1).values
    assert (difference.abs().amax(1) / spread).max() <= tolerance


@pytest.mark.parametrize("per_class", [1, 3])
@pytest.mark.parametrize("block", [2048, 3])
def test_the_best_scores_against_fp64(monkeypatch: pytest.MonkeyPatch, block: int, per_class: int) -> None:
    monkeypatch.setattr(sample_graph, "BLOCK", block)
    module, head, images = backbone(), matcher(), Images()
    graph = sample_class_graph(module, head, images, LABELS, 5, per_class=per_class, batch_size=4)
    assert_best(graph, expected_scores(module, head, images, per_class), 5, 1e-4)


def test_either_backend(cpu_backend: str) -> None:
    module, head, images = backbone(), matcher(), Images()
    graph = sample_class_graph(module, head, images, LABELS, 3)
    assert_best(graph, expected_scores(module, head, images, 1), 3, 1e-4)


def test_fp64() -> None:
    module, head, images = backbone().double(), matcher().double(), Images()
    images.images = images.images.double()
    graph = sample_class_graph(module, head, images, LABELS, N - 1, per_class=2, seed=4)
    assert_best(graph, expected_scores(module, head, images, 2), N - 1, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_class", [1, 2])
def test_autocast_reaches_the_backbone_and_the_matcher_stays_fp32(dtype: torch.dtype, per_class: int) -> None:
    module, head, images = backbone(), matcher(), Images()
    seen = []
    module.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype):
        graph = sample_class_graph(module, head, images, LABELS, 3, per_class=per_class)
    assert set(seen) == {dtype}
    assert head.fc.weight.dtype == torch.float32
    assert_best(graph, expected_scores(module, head, images, per_class), 3, 0.1)


def test_equal_scores_are_named_by_ascending_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_graph, "BLOCK", 4)
    head = QAConv(C, H, W)
    head.bn.eps = head.logit_bn.eps = 0.0  # all arithmetic is then exact: weights are 1 / S
    locations = exact_vectors(3 * H * W, C).view(3, H * W, C).mT.reshape(3, C, H, W)
    look = torch.tensor([0, 1, 2, 0, 0, 1, 0])  # what a class looks like
    graph = sample_class_graph(nn.Identity(), head, locations[look], torch.arange(N), N - 1)  # type: ignore[arg-type]
    scores = head.match(locations.double(), locations.double())[look][:, look].fill_diagonal_(-torch.inf)
    assert torch.equal(graph, scores.sort(dim=1, descending=True, stable=True).indices[:, :-1])


def test_a_seed_decides_which_images_are_read() -> None:
    module, head, images = backbone(), matcher(), Images()

    def read(**options: Any) -> tuple[list[int], Tensor]:
        images.asked.clear()
        graph = sample_class_graph(module, head, images, LABELS, 4, **options)
        return list(images.asked), graph

    asked, graph = read(seed=1)
    again, same_graph = read(seed=1, batch_size=256)
    assert again == asked
    assert torch.equal(same_graph, graph)
    assert LABELS[asked].tolist() == list(range(N))
    drawn = {sample for seed in range(40) for sample in read(seed=seed)[0]}
    assert drawn == set(range(len(LABELS)))


class Marked(nn.Module):
    """Its mode is more than a flag."""

    mode = True

    def train(self, mode: bool = True) -> Marked:
        self.mode = mode
        return super().train(mode)

    def forward(self, maps: Tensor) -> Tensor:
        assert not self.mode
        assert not torch.is_grad_enabled()
        return maps


@pytest.mark.parametrize("fails", [False, True])
def test_modes_statistics_and_random_states_are_as_before(fails: bool) -> None:
    module, head = nn.Sequential(*backbone(), Marked()), matcher()
    module[1].eval()
    modes = [part.training for part in (*module.modules(), *head.modules())]
    assert len(set(modes)) == 2
    states = [{name: value.clone() for name, value in part.state_dict().items()} for part in (module, head)]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    images = Images()
    images.images[3] = torch.nan if fails else images.images[3]
    if fails:
        with pytest.raises(ValueError, match=rf"NaN or Inf in 1 of {N} classes, first: \[{int(LABELS[3])}\]"):
            sample_class_graph(module, head, images, LABELS, 2, per_class=5)
    else:
        assert not sample_class_graph(module, head, images, LABELS, 2, per_class=5).requires_grad
    assert [part.training for part in (*module.modules(), *head.modules())] == modes
    assert module[-1].mode
    for part, state in zip((module, head), states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())
        assert all(parameter.grad is None for parameter in part.parameters())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()  # type: ignore[index]


def test_sampler_and_matcher_take_the_graph() -> None:
    module, head = backbone(), matcher(num_classes=N, k_nearest=4)
    data = TensorDataset(Images().images, LABELS)  # samples are tuples
    epochs = iter(range(2))
    graphs: list[Tensor] = []

    def neighbors() -> Tensor:
        graphs.append(sample_class_graph(module, head, data, LABELS.tolist(), 4, seed=next(epochs)))
        return graphs[-1]

    sampler = GraphSampler(LABELS, neighbors, batch_size=10, num_instances=2)
    for epoch in range(2):
        batches = list(sampler)
        assert len(graphs) == epoch + 1
        for batch in batches:
            classes = LABELS[batch][::2].tolist()
            assert classes[1:] == graphs[-1][classes[0]].tolist()
    head.class_neighbors = graphs[-1]
    assert (
        head.class_scores(torch.randn(2, C, H, W), torch.tensor([6, 0])).classes[0].tolist() == graphs[-1][6].tolist()
    )


def test_default_dtype_and_device_do_not_matter() -> None:
    module, head, images = backbone(), matcher(), Images()
    expected = sample_class_graph(module, head, images, LABELS, 3, per_class=2)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        graph = sample_class_graph(module, head, images, LABELS, 3, per_class=2)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(graph, expected)


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    sample_class_graph(backbone(), matcher(), Images(), LABELS, 3, per_class=2)
    assert capsys.readouterr().err == ""
    sample_class_graph(backbone(), matcher(), Images(), LABELS, 3, per_class=2, progress=True)
    shown = capsys.readouterr().err
    images = sum(min(count, 2) for count in COUNTS)
    assert f"class maps: 100%, {images} of {images} images" in shown
    assert f"class graph: 100%, {N * N} of {N * N} pairs" in shown


class Half(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.ones(len(images) // 2, C, H, W)


def nan_head() -> QAConv:
    head = matcher()
    nn.init.constant_(head.fc.bias, torch.nan)
    return head


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"k": 0}, ValueError, f"k must be between 1 and {N - 1} .*got 0"),
        ({"k": N}, ValueError, f"k must be between 1 and {N - 1} .*got {N}"),
        ({"k": 2.0}, TypeError, "k: .*float"),
        ({"per_class": 0}, ValueError, "per_class must be at least 1 .*got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1 .*got 0"),
        ({"seed": -1}, ValueError, "seed must be between 0 .*got -1"),
        ({"progress": 1}, TypeError, "progress: .*got 1"),
        ({"labels": LABELS[1:]}, ValueError, f"each of {len(LABELS) - 1} labels, got {len(LABELS)} samples"),
        ({"labels": LABELS * 2}, ValueError, rf"{N - 1} of {2 * N - 1} classes, first: \[1, 3, 5, 7, 9\]"),
        ({"labels": LABELS + 2**40}, ValueError, rf"{2**40} of {2**40 + N} classes, first: \[0, 1, 2, 3, 4\]"),
        ({"labels": LABELS.float()}, TypeError, "float32"),
        ({"backbone": lambda images: images}, TypeError, "backbone: expected a Module, got function"),
        ({"matcher": nn.Identity()}, TypeError, "matcher: expected a QAConv, got Identity"),
        (
            {"matcher": QAConv(C, W, 3)},
            ValueError,
            rf"output of the backbone: .*\[B, {C}, {W}, 3\], got shape \[4, {C}, {H}, {W}\]",
        ),
        ({"matcher": QAConv(C, H, W, 5, 2).to("meta")}, ValueError, "is on cpu, but the matcher is on meta"),
        ({"matcher": nan_head()}, ValueError, "scores of the matcher hold NaN or Inf, between classes 0 to 6"),
        ({"backbone": nn.Flatten()}, ValueError, r"output of the backbone: .*got shape \[4, 48\]"),
        ({"backbone": nn.Unfold(2)}, ValueError, r"output of the backbone: .*got shape \[4, 12, 9\]"),
        ({"backbone": Half()}, ValueError, rf"one for each of 4 images \[4, 3, 4, 4\], got shape \[2, {C}, {H}, {W}\]"),
    ],
)
def test_bad_input_is_refused(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    good = {
        "backbone": backbone(),
        "matcher": matcher(),
        "dataset": Images(),
        "labels": LABELS,
        "k": 3,
        "batch_size": 4,
    }
    sample_class_graph(**good)
    with pytest.raises(error, match=text):
        sample_class_graph(**{**good, **changed})


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        ({"image": torch.zeros(3, 4, 4)}, r"dataset\[\d+\]: expected an image tensor.*, got dict"),
        ((np.zeros((3, 4, 4)), 1), "got tuple of ndarray"),
        ((), "got tuple"),
    ],
)
def test_samples_without_an_image_tensor_are_refused(sample: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        sample_class_graph(backbone(), matcher(), [sample] * 4, [0, 0, 1, 1], 1)  # type: ignore[arg-type]
