"""`rank_gallery`: the k best of every query are those of a sort of all scores, whatever form the features come in."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from errors import refused, state_of
from inputs import CPU, DEVICE, C, H, W, make_matcher, maps, torch_default, visibility
from tolerances import assert_close
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from bench.ranking import main as measure_ranking
from qaconv_triton import QAConv
from qaconv_triton.evaluation import Features, rank_gallery, ranking, save_features

Q, G, K = 7, 33, 5
QUERY, GALLERY = maps(Q, 1), maps(G, 2)


def by_sorting(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row in fp64, equal ones by ascending index, one row after the other."""
    rows = [sorted(range(scores.shape[1]), key=lambda i, row=row: (-row[i], i))[:k] for row in scores.tolist()]
    indices = torch.tensor(rows, device=scores.device).reshape(len(scores), k)
    return scores.gather(1, indices), indices


def chunks(values: Tensor, *sizes: int) -> Iterator[Tensor]:
    """Chunks of these sizes, over and over, as from a backbone."""
    start = 0
    while start < len(values):
        for size in sizes:
            yield values[start : start + size]
            start += size


def to_memmap(values: Tensor, path: Path, dtype: Any = np.float32) -> np.ndarray:
    np.save(path, values.cpu().numpy().astype(dtype))
    return np.load(path, mmap_mode="r")


FORMS: dict[str, Callable[[Tensor, Path], Any]] = {
    "tensor": lambda values, path: values,
    "on the CPU": lambda values, path: values.cpu(),
    "memmap": lambda values, path: to_memmap(values, path),
    "big-endian memmap": lambda values, path: to_memmap(values, path, ">f4"),
    "chunks": lambda values, path: chunks(values, 4, 1, 9),
    "a list of arrays": lambda values, path: [part.cpu().numpy() for part in values.split(10)],
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three queries and five or ten gallery maps at a time: nothing fits one block."""
    monkeypatch.setattr(ranking, "MOST_QUERIES", 3)
    monkeypatch.setattr(ranking, "MOST_ITEMS", 5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("query_form", FORMS)
@pytest.mark.parametrize("gallery_form", FORMS)
def test_every_form_of_features_gives_the_best_of_all_scores(
    query_form: str, gallery_form: str, tmp_path: Path
) -> None:
    matcher = make_matcher()
    query, gallery = FORMS[query_form](QUERY, tmp_path / "q.npy"), FORMS[gallery_form](GALLERY, tmp_path / "g.npy")
    scores, indices = rank_gallery(matcher, query, gallery, K)
    true_scores, true_indices = by_sorting(matcher.match(QUERY, GALLERY), K)
    assert_close(scores, true_scores, torch.float32)
    assert torch.equal(indices, true_indices)
    assert scores.device == indices.device == DEVICE
    assert matcher.training


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("forms", [("array", "array"), ("array", "chunks"), ("chunks", "array"), ("chunks", "chunks")])
@pytest.mark.parametrize("prefilter", [None, 20])
def test_visibility_goes_with_its_maps(forms: tuple[str, str], prefilter: int | None) -> None:
    matcher, query_occ, gallery_occ = make_matcher(), visibility(Q, 3), visibility(G, 4)

    def given(values: Tensor, form: str) -> Any:
        return chunks(values, 4, 3) if form == "chunks" else values.cpu().numpy()

    of_maps, of_visibility = forms
    gallery = GALLERY if prefilter else given(GALLERY, of_maps)
    scores, indices = rank_gallery(
        matcher,
        given(QUERY, of_maps),
        gallery,
        K,
        query_occ=given(query_occ, of_visibility),
        gallery_occ=given(gallery_occ, of_visibility),
        prefilter=prefilter,
    )
    all_scores = matcher.match(QUERY, GALLERY, query_occ, gallery_occ)
    assert_close(scores, all_scores.gather(1, indices), torch.float32)
    if prefilter is None:
        assert torch.equal(indices, by_sorting(all_scores, K)[1])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("backend", "prefilter"), [("torch", K), ("torch", G), ("torch", 12), ("triton", 12)], indirect=["backend"]
)
def test_prefilter_scores_the_nearest_flat_maps_alone(backend: str, prefilter: int) -> None:
    matcher, weights = make_matcher(), (visibility(Q, 3), visibility(G, 4))
    scores, indices = rank_gallery(
        matcher, QUERY, GALLERY.half(), K, query_occ=weights[0], gallery_occ=weights[1], prefilter=prefilter
    )
    flat = [
        normalize((normalize(each.double(), dim=1) * weight).flatten(1), dim=1)
        for each, weight in zip((QUERY, GALLERY.half()), weights, strict=True)
    ]
    cosines = flat[0] @ flat[1].mT
    outside = cosines.argsort(dim=1, descending=True)[:, prefilter:]
    all_scores = matcher.match(QUERY, GALLERY.half(), *weights).scatter(1, outside, -torch.inf)
    true_scores, true_indices = by_sorting(all_scores, K)
    assert_close(scores, true_scores, torch.float32)
    assert torch.equal(indices, true_indices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("prefilter", [None, 10])
def test_scores_are_those_of_match_in_every_dtype(dtype: torch.dtype, prefilter: int | None) -> None:
    matcher = make_matcher(torch.float64 if dtype == torch.float64 else torch.float32)
    query, gallery = QUERY.to(dtype), GALLERY.to(dtype)
    scores, indices = rank_gallery(matcher, query, gallery, K, prefilter=prefilter)
    expected = matcher.match(query, gallery)
    assert scores.dtype == expected.dtype
    assert_close(scores, expected.gather(1, indices), dtype)
    assert (scores.diff(dim=1) <= 0).all()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("prefilter", [None, 12])
def test_equal_scores_come_by_ascending_row(prefilter: int | None) -> None:
    """The same map thrice, with numbers whose products and sums are exact, in whatever order they are taken."""
    matcher = QAConv(C, H, W).to(DEVICE).eval()
    matcher.fc.weight.data.fill_(0.25)
    matcher.bn.eps = matcher.logit_bn.eps = 0.0
    few = torch.eye(C, device=DEVICE)[:4, :, None, None].expand(-1, -1, H, W)
    gallery = few.repeat(3, 1, 1, 1)
    _, indices = rank_gallery(matcher, few, gallery, 6, prefilter=prefilter)
    others = [[i for i in range(12) if i % 4 != query] for query in range(4)]
    assert indices.tolist() == [[query, query + 4, query + 8, *others[query][:3]] for query in range(4)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("prefilter", [None, G])
def test_nan_comes_last_and_stays_nan(prefilter: int | None, caplog: pytest.LogCaptureFixture) -> None:
    matcher, query, gallery = make_matcher(), QUERY.clone(), GALLERY.clone()
    query[2, 1, 0, 0] = gallery[[4, 20], 0] = torch.nan
    with caplog.at_level(logging.WARNING, logger="qaconv_triton"):
        scores, indices = rank_gallery(matcher, query, gallery, G, prefilter=prefilter)
    assert [record.getMessage() for record in caplog.records] == ["1 of 7 queries have NaN scores only, row 2 first"]
    rest = [0, 1, 3, 4, 5, 6]
    assert indices[rest, -2:].sort().values.tolist() == [[4, 20]] * 6
    assert scores[rest, -2:].isnan().all()
    assert scores[rest, :-2].isfinite().all()
    assert scores[2].isnan().all()


def test_the_matcher_stays_as_it_is_and_nothing_has_a_gradient() -> None:
    for mode in ("train", "eval", "frozen bn"):
        matcher = make_matcher(mode=mode)
        before = state_of(matcher)
        first = rank_gallery(matcher, QUERY.requires_grad_(), GALLERY, K)
        second = rank_gallery(matcher, QUERY, GALLERY, K)
        QUERY.requires_grad_(False)
        after = state_of(matcher)
        assert all(torch.equal(b, after[n]) if isinstance(b, Tensor) else b == after[n] for n, b in before.items())
        assert not first[0].requires_grad
        assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_no_queries_give_empty_lists() -> None:
    for prefilter in (None, 6):
        scores, indices = rank_gallery(make_matcher(), QUERY[:0], GALLERY, K, prefilter=prefilter)
        assert scores.shape == indices.shape == (0, K)
    for default in (torch.float64, torch.bfloat16):
        with torch_default(default):
            scores, indices = rank_gallery(make_matcher(), [], GALLERY, K)
        assert scores.shape == indices.shape == (0, K)
        assert scores.dtype == torch.float32


def test_chunks_of_visibility_may_have_a_channel_or_none() -> None:
    occ = visibility(G, 3)
    expected = rank_gallery(make_matcher(), QUERY, GALLERY, K, gallery_occ=occ)
    mixed = rank_gallery(make_matcher(), QUERY, GALLERY, K, gallery_occ=[occ[:4], occ[4:, 0]])
    assert all(torch.equal(*parts) for parts in zip(mixed, expected, strict=True))


def test_a_gallery_of_chunks_is_never_held() -> None:
    chunk_refs: list[weakref.ref[Tensor]] = []

    def from_backbone() -> Iterator[Tensor]:
        for seed in range(30):
            chunk = maps(3, seed)
            chunk_refs.append(weakref.ref(chunk))
            assert sum(ref() is not None for ref in chunk_refs) <= 4  # one that is scored, the next ones, this one
            yield chunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "MOST_ITEMS", 5)
        _, indices = rank_gallery(make_matcher(), QUERY, from_backbone(), K)
    gallery = torch.cat([maps(3, seed) for seed in range(30)])
    assert torch.equal(indices, by_sorting(make_matcher().match(QUERY, gallery), K)[1])


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and not value.is_meta and value._base is None:
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("prefilter", [None, 10])
def test_no_tensor_of_all_pairs_exists(prefilter: int | None) -> None:
    query, gallery = maps(50, 1), maps(400, 2).cpu().numpy()
    with LargestTensor() as largest:
        rank_gallery(make_matcher(), query, gallery, K, prefilter=prefilter)
    assert 100 < largest.elements < 3000  # 20,000 pairs


def test_progress_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qaconv_triton.progress.SECONDS_BETWEEN_LINES", 0.0)
    matcher = make_matcher()
    rank_gallery(matcher, QUERY, GALLERY, K, progress=True)
    assert f"ranking: 100%, {Q * G} of {Q * G} pairs" in capsys.readouterr().err
    rank_gallery(matcher, QUERY, GALLERY, K, prefilter=10, progress=True)
    assert f"ranking: 100%, {Q * 10} of {Q * 10} pairs" in capsys.readouterr().err
    rank_gallery(matcher, QUERY, chunks(GALLERY, 8), K, progress=True)
    assert f"ranking: {Q * G} pairs" in capsys.readouterr().err
    rank_gallery(matcher, QUERY, GALLERY, K)
    assert not capsys.readouterr().err


FEATURES = Features(QUERY, torch.arange(Q), None, None, None)
WRONG: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"matcher": torch.nn.Linear(2, 2)}, TypeError, ("matcher: expected a QAConv", "Linear")),
    (
        {"query": maps(3, 1, shape=(C, H, W + 1))},
        ValueError,
        (f"query: expected feature maps [B, {C}, {H}, {W}]",),
    ),
    ({"query": QUERY.long()}, TypeError, ("query", "torch.int64")),
    ({"query": QUERY.to_sparse()}, TypeError, ("query: expected a dense tensor",)),
    ({"query": QUERY.to("meta")}, ValueError, ("query", "meta")),
    ({"query": 3}, TypeError, ("query", "int")),
    ({"query": FEATURES}, TypeError, ("query: expected", "got Features: pass its .maps, and its .occ as query_occ")),
    ({"gallery": FEATURES, "prefilter": 8}, TypeError, ("gallery", "got Features: pass its .maps")),
    ({"query": ["picture.jpg"]}, TypeError, ("query, chunk 1", "str")),
    ({"gallery": [(GALLERY, GALLERY)]}, TypeError, ("gallery, chunk 1", "tuple")),
    ({"gallery": list(GALLERY)}, ValueError, ("gallery, chunk 1", f"[{C}, {H}, {W}]")),
    ({"gallery": GALLERY.cpu().numpy().astype(object)}, TypeError, ("gallery", "object")),
    ({"gallery": np.zeros((3, C, H), np.float32)}, ValueError, ("gallery", f"[3, {C}, {H}]")),
    ({"k": 0}, ValueError, ("k must be at least 1", "got 0")),
    ({"k": G + 1}, ValueError, (f"k must be between 1 and {G}", f"the gallery has {G} maps", f"got {G + 1}")),
    ({"gallery": GALLERY[:0]}, ValueError, (f"gallery: expected at least k = {K} maps, got none",)),
    ({"gallery": []}, ValueError, (f"gallery: expected at least k = {K} maps, got none",)),
    ({"k": 2.0}, TypeError, ("k: expected an int", "float")),
    ({"gallery": [GALLERY[:2]], "k": 3}, ValueError, ("the gallery has 2 maps", "got 3")),
    ({"prefilter": K - 1}, ValueError, (f"between {K} and {G}", f"got {K - 1}")),
    ({"prefilter": G + 1}, ValueError, (f"between {K} and {G}", f"got {G + 1}")),
    ({"prefilter": 8, "gallery": [GALLERY]}, ValueError, ("prefilter=8 reads the gallery twice", "list; torch.cat")),
    ({"progress": 1}, TypeError, ("progress", "1")),
    ({"query_occ": visibility(Q - 1, 1)}, ValueError, ("query_occ", f"[{Q}, 1, {H}, {W}]", f"[{Q - 1}, 1, {H}, {W}]")),
    ({"gallery_occ": []}, ValueError, ("gallery_occ", f"[0, 1, {H}, {W}]")),
    ({"gallery_occ": 5}, TypeError, ("gallery_occ", "int")),
    ({"gallery_occ": [5]}, TypeError, ("gallery_occ, chunk 1", "int")),
    ({"gallery_occ": [torch.tensor(1.0)]}, ValueError, ("gallery_occ, chunk 1", "got []")),
    ({"gallery_occ": [visibility(4, 1), maps(G - 4, 1)]}, ValueError, ("gallery_occ, chunk 2", f"[{G - 4}, {C}, ")),
    ({"gallery_occ": [visibility(G, 1)[:4]]}, ValueError, ("gallery_occ", f"[4, 1, {H}, {W}]")),
    ({"gallery": [GALLERY], "gallery_occ": []}, ValueError, ("gallery_occ: expected a chunk for each", "got 0")),
    ({"gallery": [GALLERY], "gallery_occ": [visibility(G, 1)] * 2}, ValueError, ("gallery_occ", "of 1", "got more")),
    ({"gallery": [GALLERY], "gallery_occ": visibility(G + 1, 1)}, ValueError, (f"expected {G} maps", f"[{G + 1}, ")),
    ({"gallery": [GALLERY], "gallery_occ": [5]}, TypeError, ("gallery_occ, chunk 1", "int")),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=[f"{i} {w[2][0]}" for i, w in enumerate(WRONG)])
def test_bad_input_is_refused(arguments: dict[str, Any], error: type[Exception], message: tuple[str, ...]) -> None:
    matcher = make_matcher()
    given = {"matcher": matcher, "query": QUERY, "gallery": GALLERY, "k": K, **arguments}
    with refused(error, message, matcher):
        rank_gallery(**given)


def test_norms_without_running_statistics_are_refused() -> None:
    matcher = make_matcher()
    matcher.bn = torch.nn.BatchNorm1d(1, track_running_stats=False).to(DEVICE)
    with pytest.raises(ValueError, match="running statistics"):
        rank_gallery(matcher, QUERY, GALLERY, K)


def test_a_failing_gallery_leaves_the_matcher_as_it_was() -> None:
    def failing() -> Iterator[Tensor]:
        yield GALLERY
        raise OSError("no such picture")

    matcher = make_matcher()
    with refused(OSError, ("no such picture",), matcher):
        rank_gallery(matcher, QUERY, failing(), K)


def test_the_command_reports_recall(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def rows(*arguments: str) -> list[list[str]]:
        measure_ranking([*arguments, "--queries", "8", "--device", "cpu"])
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| all", "| the"))]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    every, few, whole = rows("--case", "12x40x8x4x2", "--prefilter", "11", "40")
    assert every[:3] == ["all pairs", "8", "320"]
    assert few[:3] == ["the nearest 11", "12", "132"]
    assert 0.3 < float(few[5]) < 1
    assert whole[5:] == ["1.000", "1.000"]  # all 40 are candidates

    matcher, files = make_matcher(device=CPU), [str(tmp_path / name) for name in ("query", "gallery")]
    for path, features in zip(files, (QUERY, GALLERY), strict=True):
        save_features(path, features, range(len(features)), dtype=torch.float32)
    state = {f"matcher.{name}": value for name, value in matcher.state_dict().items()}
    torch.save({"matcher": state}, tmp_path / "weights.pt")
    few = rows("--features", *files, "--weights", str(tmp_path / "weights.pt"), "--prefilter", "15")[1]
    best = rank_gallery(matcher, QUERY.to(CPU), GALLERY.to(CPU), 10)[1]
    found = rank_gallery(matcher, QUERY.to(CPU), GALLERY.to(CPU), 10, prefilter=15)[1]
    assert few[1] == str(Q)
    share = sum(len(set(one) & set(other)) for one, other in zip(best.tolist(), found.tolist(), strict=True)) / (10 * Q)
    assert float(few[5]) == pytest.approx(share, abs=1e-3)
