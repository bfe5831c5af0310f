"""Which tensors the tensor memory accelerator may copy tiles of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor

from qaconv_triton.kernels import config, descriptors


def maps(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.fixture
def tma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "has_tma", lambda: True)


@pytest.mark.usefixtures("tma")
@pytest.mark.parametrize(
    ("tensor", "fits"),
    [
        pytest.param(maps(4, 7, 16), True, id="contiguous"),
        pytest.param(maps(4, 7, 12), False, id="rows of 24 bytes"),
        pytest.param(maps(4, 7, 12, dtype=torch.float32), True, id="rows of 48 bytes"),
        pytest.param(maps(4, 16, 7).mT, False, id="channels first"),
        pytest.param(maps(8, 7, 16)[::2], True, id="every second map"),
        pytest.param(maps(4, 7, 24)[:, :, :16], True, id="some channels"),
        pytest.param(maps(4, 7, 24)[:, :, 4:20], False, id="from an odd address"),
        pytest.param(maps(1, 7, 16).expand(4, 7, 16), False, id="one map many times"),
        pytest.param(maps(0, 7, 16), False, id="none"),
    ],
)
def test_what_a_descriptor_takes(tensor: Tensor, fits: bool) -> None:
    assert descriptors.may_be_described(tensor) is fits
    assert descriptors.may_be_described(maps(2, 16), tensor) is fits
    found = descriptors.described(tensor, 16, 64, fits)
    if fits:
        assert isinstance(found, TensorDescriptor)
        assert (*found.shape, *found.strides) == (*tensor.shape, *tensor.stride())
        assert found.block_shape == [1, 16, 64]
    else:
        assert found is tensor


@pytest.mark.parametrize(("architecture", "there"), [(80, False), (89, False), (90, True), (100, True), (120, False)])
def test_which_gpus_have_one(architecture: int, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "generation", lambda: architecture)
    monkeypatch.setattr(config, "INTERPRETED", False)
    assert config.has_tma() is there
    assert config.has_ptx()
    monkeypatch.setattr(config, "INTERPRETED", True)
    assert not config.has_tma()
    assert not config.has_ptx()
