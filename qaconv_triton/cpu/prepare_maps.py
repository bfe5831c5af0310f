"""Feature maps as they are matched, in plain torch, with the gradient written out; also in fp64 on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dtypes import accumulation_dtype
from ..common.norms import inverse_norm, power_of_two


def prepare_maps(maps: Tensor, visibility: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `kernels.prepare_maps.prepare_maps`: unit maps times visibility `[B, S, C]`, and factors `[B, S, 2]`."""
    wide = maps.to(accumulation_dtype(maps.dtype)).contiguous()
    scale = power_of_two(wide)
    unit = wide * scale
    inverse = inverse_norm(unit)
    unit *= inverse
    if visibility is not None:
        unit *= visibility.unsqueeze(2)
    return unit.to(dtype), torch.cat([scale, inverse], dim=2)


def prepare_maps_backward(
    grad: Tensor, maps: Tensor, visibility: Tensor | None, factors: Tensor, is_unit: bool
) -> tuple[Tensor, Tensor]:
    """As `kernels.prepare_maps.prepare_maps_backward`: gradients to the maps and to visibility."""
    scale, inverse = factors.split(1, dim=2)
    grad, unit = grad.to(factors.dtype), maps.to(factors.dtype).contiguous()
    if not is_unit:
        unit = (unit * scale).mul_(inverse)
    radial = (grad * unit).sum(2, keepdim=True)  # the part that normalising removes
    to_maps = torch.addcmul(grad, unit, radial, value=-1.0)
    to_visibility = factors.new_empty(0)
    if visibility is not None:
        to_visibility = radial.squeeze(2)
        inverse = inverse * visibility.unsqueeze(2)
    return to_maps.mul_(inverse).mul_(scale).to(maps.dtype), to_visibility
