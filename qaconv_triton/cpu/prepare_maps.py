"""Feature maps as they are matched, in plain torch, with the gradient written out; also in fp64 on a GPU.

Little is allocated: to be given fresh pages takes longer than the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.dtypes import accumulation_dtype
from ..common.norms import power_of_two


def _scaled(maps: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Maps `[B, S, C]` times a scale, by default that of `power_of_two`, contiguous and in `dtype`; and the scale."""
    wide = maps.to(dtype).contiguous()
    scale = power_of_two(wide) if scale is None else scale
    return (wide * scale if wide is maps else wide.mul_(scale)), scale


def prepare_maps(maps: Tensor, visibility: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `kernels.prepare_maps.prepare_maps`: unit maps times visibility `[B, S, C]`, and factors `[B, S, 2]`."""
    unit, scale = _scaled(maps, None, accumulation_dtype(maps.dtype))
    norm = torch.linalg.vector_norm(unit, dim=2, keepdim=True)
    inverse = norm.reciprocal().masked_fill_(norm == 0, 0.0)
    unit *= inverse
    if visibility is not None:
        unit *= visibility.unsqueeze(2)
    return unit.to(dtype), torch.cat([scale, inverse], dim=2)


def prepare_maps_backward(
    grad: Tensor, maps: Tensor, visibility: Tensor | None, factors: Tensor, is_unit: bool
) -> tuple[Tensor, Tensor]:
    """As `kernels.prepare_maps.prepare_maps_backward`: gradients to the maps and to visibility."""
    scale, inverse = factors.split(1, dim=2)
    grad = grad.to(factors.dtype)
    unit = maps.contiguous() if is_unit else _scaled(maps, scale, factors.dtype)[0].mul_(inverse)
    product = grad * unit
    radial = product.sum(2, keepdim=True)  # the part that normalising removes
    to_maps = torch.addcmul(grad, unit, radial, value=-1.0, out=product)
    to_visibility = factors.new_empty(0)
    if visibility is not None:
        to_visibility = radial.squeeze(2)
        inverse = inverse * visibility.unsqueeze(2)
    return to_maps.mul_(inverse).mul_(scale).to(maps.dtype), to_visibility
