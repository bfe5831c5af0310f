"""Feature files: what was saved comes back, memory-mapped; what is wrong, truncated or foreign has a clear error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from inputs import CPU, C, H, W, maps, visibility
from safetensors.torch import save_file
from torch import Tensor

from qaconv_triton.evaluation import Features, feature_store, load_features, save_features

M = 11
MAPS, OCC = maps(M, 1, device=CPU), visibility(M, 2, device=CPU)
IDS, CAMERAS = torch.arange(M) // 2, [i % 3 for i in range(M)]
PATHS = [f"pictures/{i:04}.jpg" for i in range(M - 1)] + ["ein Bild \udcff\nmit ß.jpg"]  # not every name is UTF-8


def saved(path: Path, **changes: Any) -> Path:
    given = {"maps": MAPS, "ids": IDS, "cameras": CAMERAS, "occ": OCC, "paths": PATHS, **changes}
    save_features(path / "features.safetensors", given.pop("maps"), given.pop("ids"), given.pop("cameras"), **given)
    return path / "features.safetensors"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["tensor", "array", "chunks"])
def test_what_was_saved_comes_back(dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    def given(values: Tensor) -> Any:
        return {"tensor": values, "array": values.numpy(), "chunks": iter(values.split([2, 5, 0, 4]))}[form]

    path = saved(tmp_path, maps=given(MAPS), occ=given(OCC), dtype=dtype)
    features = load_features(path)
    assert features.maps.dtype == dtype
    assert torch.equal(features.maps, MAPS.to(dtype))
    assert features.occ is not None
    assert torch.equal(features.occ, OCC.to(dtype))
    assert torch.equal(features.ids, IDS)
    assert features.cameras is not None
    assert features.cameras.tolist() == CAMERAS
    assert features.paths == PATHS
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_what_was_not_given_is_none(tmp_path: Path) -> None:
    features = load_features(saved(tmp_path, cameras=None, occ=None, paths=None))
    assert features[2:] == (None, None, None)
    assert isinstance(features, Features)
    none = load_features(saved(tmp_path, maps=MAPS[:0], ids=[], cameras=[], occ=OCC[:0], paths=[]))
    assert none.maps.shape == (0, C, H, W)
    assert none.paths == []


def test_any_reader_of_safetensors_opens_the_file(tmp_path: Path) -> None:
    with safetensors.safe_open(saved(tmp_path, dtype=torch.float32), framework="numpy") as file:
        assert set(file.keys()) == {"maps", "ids", "cameras", "occ", "paths"}
        assert np.array_equal(file.get_tensor("maps"), MAPS.numpy())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_neither_writing_nor_reading_holds_all_maps(tmp_path: Path) -> None:
    """200 MB of maps, of which a chunk of 1 MB exists at a time, and of which a row is read."""
    count, largest, before = 200, 0, resident_bytes()

    def from_backbone() -> Iterator[Tensor]:
        nonlocal largest
        for number in range(count):
            largest = max(largest, resident_bytes() - before)
            yield torch.full((8, 64, 16, 64), number + 1.0)

    path = tmp_path / "features.safetensors"
    save_features(path, from_backbone(), range(8 * count))
    assert path.stat().st_size > 200 * 2**20
    assert largest < 60 * 2**20
    before = resident_bytes()
    features = load_features(path)
    assert (features.maps[-1] == count).all()
    assert resident_bytes() - before < 60 * 2**20


def test_a_failure_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    def failing() -> Iterator[Tensor]:
        yield MAPS[:5]
        raise KeyboardInterrupt

    path = saved(tmp_path)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, maps=failing(), occ=None)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_what_cannot_be_a_file_is_refused_before_a_chunk_is_read(tmp_path: Path) -> None:
    chunks = iter([MAPS])
    with pytest.raises(IsADirectoryError, match="expected the path of a file, got a folder"):
        save_features(tmp_path, chunks, IDS)
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*missing'$"):
        save_features(tmp_path / "missing" / "gallery.safetensors", chunks, IDS)
    with pytest.raises(ValueError, match=r"\\udcff\.safetensors': expected a path in UTF-8"):
        save_features(tmp_path / "\udcff.safetensors", chunks, IDS)
    assert len(list(chunks)) == 1


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    def while_another_writes() -> Iterator[Tensor]:
        yield MAPS[:5]
        saved(tmp_path, paths=None)
        yield MAPS[5:]

    features = load_features(saved(tmp_path, maps=while_another_writes(), occ=None))
    assert torch.equal(features.maps, MAPS.half())
    assert features.paths == PATHS
    assert [item.name for item in tmp_path.iterdir()] == ["features.safetensors"]


BIG, TINY = MAPS.clone(), MAPS.clone()
BIG[7, 0, 0, 0], TINY[9] = 7e4, 1e-9
NAN, INF = MAPS.clone(), MAPS.clone()
NAN[3, 0, 0, 0], INF[5, 0, 0, :2] = torch.nan, -torch.inf
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dtype": torch.float64}, TypeError, r"dtype: expected .*, got torch\.float64"),
    ({"maps": MAPS[:, 0]}, ValueError, rf"maps: expected feature maps \[B, C, H, W\], got shape \[{M}, {H}, {W}\]"),
    ({"maps": MAPS.long()}, TypeError, r"maps: .*got torch\.int64"),
    ({"maps": MAPS[1:], "occ": None}, ValueError, rf"maps: expected {M}, as there are ids, got {M - 1}"),
    ({"maps": [MAPS[1:]], "occ": None}, ValueError, rf"maps: expected {M}, as there are ids, got {M - 1}"),
    ({"maps": [MAPS, MAPS], "occ": None}, ValueError, rf"maps: expected {M}, .* got {2 * M} or more"),
    ({"maps": [], "occ": None}, ValueError, rf"maps: expected {M}, as there are ids, got 0"),
    ({"maps": [MAPS[:4], MAPS[4:, 1:]], "occ": None}, ValueError, rf"maps, chunk 2: expected .*\[B, {C}, {H}, {W}\]"),
    ({"maps": 7}, TypeError, r"maps: expected .*, got int"),
    ({"maps": BIG}, ValueError, r"maps: torch\.float16 cannot hold row 7, whose largest magnitude is 7e\+04"),
    ({"maps": NAN}, ValueError, rf"maps: .*, got row 3: 1 of its {C * H * W} numbers are NaN or Inf .*torch\.float16"),
    ({"maps": [INF[:4], INF[4:]], "occ": None}, ValueError, r"maps: expected finite numbers, got row 5: 2 of its"),
    ({"maps": INF, "dtype": torch.float32}, ValueError, r"got row 5: .* before the conversion to torch\.float32"),
    ({"occ": torch.full_like(OCC, 255)}, ValueError, r"occ: expected visibility in \[0, 1\], got 255 in row 0"),
    ({"occ": [OCC[:6], -OCC[6:, 0]], "maps": [MAPS[:6], MAPS[6:]]}, ValueError, r"in \[0, 1\], got -.* in row [6-9]"),
    ({"occ": torch.full_like(OCC, 1.0001)}, ValueError, r"occ: expected visibility in \[0, 1\], got 1\.0001"),
    ({"occ": torch.full_like(OCC, torch.inf)}, ValueError, r"occ: expected visibility in \[0, 1\], got inf in row 0"),
    ({"occ": NAN[:, :1]}, ValueError, r"occ: expected finite numbers, got row 3"),
    ({"maps": TINY}, ValueError, r"maps: torch\.float16 cannot hold row 9, whose largest magnitude is 1e-09"),
    ({"occ": OCC[1:]}, ValueError, rf"occ: expected shape \[{M}, 1, {H}, {W}\]"),
    ({"ids": IDS.float()}, TypeError, r"ids: expected an integer dtype, got torch\.float32"),
    ({"ids": ["a"] * M}, TypeError, r"ids: expected integers, got list"),
    ({"ids": 7}, ValueError, r"ids: expected a list of integers, such as \(7,\), got 7"),
    ({"maps": Features(MAPS, IDS, None, None, None)}, TypeError, r"got Features: pass its \.maps"),
    ({"ids": IDS[None]}, ValueError, rf"ids: expected shape \[M\], got \[1, {M}\]"),
    ({"cameras": CAMERAS[1:]}, ValueError, rf"cameras: expected shape \[{M}\], as ids has {M}, got \[{M - 1}\]"),
    ({"paths": PATHS[1:]}, ValueError, rf"paths: expected {M}, as there are ids, got {M - 1}"),
    ({"maps": [], "ids": [], "cameras": [], "paths": [], "occ": None}, ValueError, "maps: expected a chunk at least"),
    ({"paths": [None] * M}, TypeError, r"paths: .*NoneType"),
    ({"paths": 7}, TypeError, r"paths: expected 11 paths, got the single 7"),
    ({"paths": ["a\0b"] * M}, ValueError, r"paths: no path has a NUL, got 'a\\x00b'"),
    ({"paths": "a" * M}, TypeError, r"paths: expected 11 paths, got the single"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[f"{i} {w[2][:12]}" for i, w in enumerate(WRONG)])
def test_bad_input_writes_no_file(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        saved(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_numbers_that_fit_are_kept(tmp_path: Path) -> None:
    odd = MAPS.clone()
    odd[3], odd[6], odd[7] = 0.0, 65000.0, 1e-6
    assert torch.equal(load_features(saved(tmp_path, maps=odd)).maps, odd.half())
    wide = load_features(saved(tmp_path, maps=BIG, dtype=torch.bfloat16))
    assert torch.equal(wide.maps, BIG.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_visibility_of_a_resize_and_of_a_sigmoid_is_stored_in_0_to_1(dtype: torch.dtype, tmp_path: Path) -> None:
    resized = torch.nn.functional.interpolate(
        torch.ones(M, 1, 64, 32), size=(H, W), mode="bilinear", antialias=True, align_corners=False
    )
    resized[:3], resized[3] = 1 + 2e-7, -2e-7
    hidden = torch.full_like(OCC, -20.0).sigmoid()  # 2e-9: zero in fp16
    for occ in (resized, hidden):
        stored = load_features(saved(tmp_path, occ=occ, dtype=dtype)).occ
        assert stored is not None
        assert torch.equal(stored, occ.clamp(0, 1).to(dtype))


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(length: int, tmp_path: Path) -> None:
    path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"features\.safetensors: truncated, or not a safetensors file"):
        load_features(path)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"maps": MAPS, "ids": IDS}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a file of save_features: .* got None"):
        load_features(path)
    path.write_bytes(np.lib.format.MAGIC_PREFIX * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated, or not a safetensors file"):
        load_features(path)
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_features(tmp_path / "nothing")


@pytest.mark.parametrize(
    "change",
    [
        {"ids": IDS[1:]},
        {"ids": None},
        {"maps": MAPS[0]},
        {"cameras": IDS[:3]},
        {"occ": OCC[:, :, 1:]},
        {"paths": torch.zeros(3, dtype=torch.uint8)},
        {"paths": torch.zeros(M, dtype=torch.bfloat16)},
        {"ids": IDS.float()},
        {"cameras": IDS.int()},
        {"maps": MAPS.long()},
        {"occ": OCC.long()},
    ],
    ids=str,
)
def test_a_damaged_file_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    whole = load_features(saved(tmp_path, paths=None))
    tensors = {name: value.clone() for name, value in whole._asdict().items() if value is not None} | change
    path = tmp_path / "damaged.safetensors"
    kept = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    save_file(kept, path, metadata={"content": feature_store.CONTENT})
    with pytest.raises(ValueError, match=r"damaged\.safetensors: damaged: its tensors do not fit each other"):
        load_features(path)


def test_without_safetensors_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install qaconv-triton\[eval\]"):
        load_features(path)
