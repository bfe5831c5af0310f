"""State dicts: how those of a `QAConv` are marked and laid out, and how published QAConv checkpoints become ours.

Published QAConv has had three heads over the pooled values of a pair, S per half:

- 1.x and 2.0: `fc.weight [1, 2S]`, the gallery's half first;
- 2.1 and later: `fc.weight [1, S]` for both halves, whose two logits are added: the bias counts twice;
- OAML: `fc.weight [1, 2S]`, the probe's half first, as here.

A state dict of ours says so in its metadata, which `torch.save` keeps; safetensors and plain dicts lose it.

The matcher and the losses are `CheckedModule`s: they check the keys of a state dict before they load any of it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import sharded

if TYPE_CHECKING:
    from .matcher import QAConv

VERSION = 2  # of a module in a state dict's metadata; torch's default is 1
RELEASES = ("1.2", "2.0", "2.1", "oaml")

_logger = logging.getLogger(__name__)


class CheckedModule(nn.Module):
    """A module that checks the keys of a state dict before it loads any of it."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict as `nn.Module` does; where keys are missing or unknown, nothing of it.

        Nor is anything loaded where shapes do not fit a `QAConv` or a `ClassMemoryLoss`. Checkpoints of published
        QAConv 2.1 and later load as they are; for older ones see `convert_checkpoint`.

        Args:
            state_dict: as `state_dict` returns it, or published.
            strict: refuse keys that are missing or unknown.
            assign: keep the tensors of `state_dict`, instead of copying from them.

        Returns:
            `missing_keys` and `unexpected_keys`.

        Raises:
            RuntimeError: keys or shapes that do not fit.
        """
        if strict and isinstance(state_dict, Mapping):
            check_keys(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)


def convert_checkpoint(state_dict: Mapping[str, Any], release: str, prefix: str = "") -> OrderedDict[str, Any]:
    """Convert the state dict of a published QAConv matcher to one for `QAConv`.

    Needed for 1.x and 2.0, whose `fc.weight` has the gallery's half first. Checkpoints of 2.1 and OAML load as they
    are; converted, they are never taken for something else.

    Args:
        state_dict: a published state dict, as it is; it is not changed.
        release: "1.2" (any 1.x), "2.0", "2.1" (and later) or "oaml".
        prefix: where the matcher is in it, "" or ending in a dot, such as "module." or "criterion.matcher.".

    Returns:
        A new state dict, with `fc.weight [1, 2S]`, the probe's half first. Keys outside of the prefix are kept, and
        tensors that do not change are shared. For `shared_fc=True` load a 2.1 checkpoint as it is instead.

    Raises:
        TypeError: `state_dict` is no mapping, `fc.weight` or `fc.bias` no tensor.
        ValueError: another release, no `fc.weight` under the prefix, a shape that the release does not have, or a
            state dict of `QAConv` itself.

    Examples:
        >>> published = {"fc.weight": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "fc.bias": torch.ones(1)}
        >>> convert_checkpoint(published, release="1.2")["fc.weight"]
        tensor([[3., 4., 1., 2.]])
    """
    if release not in RELEASES:
        expected = ", ".join(repr(each) for each in RELEASES)
        raise ValueError(f"release: expected one of {expected}, got {release!r}")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping of names to tensors, got {type(state_dict).__name__}")
    if not isinstance(prefix, str) or (prefix and not prefix.endswith(".")):
        raise ValueError(f'prefix: expected "" or a name that ends in a dot, got {prefix!r}')
    metadata = OrderedDict(getattr(state_dict, "_metadata", None) or {})
    if _is_ours(metadata.get(prefix[:-1], {})):
        raise ValueError(f"state_dict: {prefix + 'fc.weight'!r} was saved or converted by qaconv_triton already")
    if prefix + "fc.weight" not in state_dict:
        raise ValueError(f"state_dict: no {prefix + 'fc.weight'!r} among its keys, first: {list(state_dict)[:5]}")
    weight, bias = state_dict[prefix + "fc.weight"], state_dict.get(prefix + "fc.bias")
    for name, value in (("fc.weight", weight), ("fc.bias", bias)):
        if not isinstance(value, Tensor) and (name == "fc.weight" or prefix + name in state_dict):
            raise TypeError(f"{prefix}{name}: expected a tensor, got {type(value).__name__}")
    size = "S" if release == "2.1" else "2S"
    if weight.dim() != 2 or weight.shape[0] != 1 or weight.shape[1] == 0 or (size == "2S" and weight.shape[1] % 2):
        raise ValueError(
            f"{prefix}fc.weight: expected [1, {size}] of release {release!r}, got shape {list(weight.shape)}"
        )
    table = state_dict.get(prefix + "class_embed")
    if isinstance(table, Tensor) and table.dim() == 4:
        locations = table.shape[2] * table.shape[3]
        if weight.shape[1] != (locations if size == "S" else 2 * locations):
            raise ValueError(
                f"{prefix}fc.weight: expected [1, {size}] of release {release!r} with S={locations} as in "
                f"{prefix}class_embed {list(table.shape)}, got shape {list(weight.shape)}"
            )
    converted = OrderedDict(state_dict)
    if release == "2.1":
        convert_shared_fc(converted, prefix, weight.shape[1])
    elif release != "oaml":
        converted[prefix + "fc.weight"] = torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)
    metadata[prefix[:-1]] = {"version": VERSION, "shared_fc": False}
    converted._metadata = metadata  # type: ignore[attr-defined]
    return converted


def convert_shared_fc(state_dict: MutableMapping[str, Any], prefix: str, locations: int) -> None:
    """Rewrite a shared `fc` of `prefix` in place to the same function over the concatenated halves.

    QAConv 2.1 applies `Linear(S, 1)` to each half and adds the two logits, so the bias counts twice:
    `fc.weight [1, S]` becomes `cat(w, w) [1, 2S]` and `fc.bias` becomes `2 b`. Anything else is left alone.

    Args:
        state_dict: the mapping being loaded.
        prefix: the matcher's prefix in it, "" or ending in a dot.
        locations: S = H*W.

    Examples:
        >>> state = {"fc.weight": torch.ones(1, 4), "fc.bias": torch.ones(1)}
        >>> convert_shared_fc(state, "", locations=4)
        >>> state["fc.weight"].shape, state["fc.bias"]
        (torch.Size([1, 8]), tensor([2.]))
    """
    weight, bias = state_dict.get(prefix + "fc.weight"), state_dict.get(prefix + "fc.bias")
    if isinstance(weight, Tensor) and tuple(weight.shape) == (1, locations):
        state_dict[prefix + "fc.weight"] = torch.cat([weight, weight], dim=1)
        if isinstance(bias, Tensor):
            state_dict[prefix + "fc.bias"] = 2 * bias


def finish_saving(matcher: QAConv, state_dict: MutableMapping[str, Any], prefix: str, keep_vars: bool) -> None:
    """Make the matcher's tensors in `state_dict` contiguous, and note in its metadata what they belong to.

    With `keep_vars` the parameters themselves are wanted, and stay.
    """
    key = prefix + "class_embed"
    if key in state_dict and not keep_vars:
        state_dict[key] = state_dict[key].contiguous()
        if matcher.mesh is not None:
            sharded.table.refuse_pickling(state_dict[key])
    metadata = getattr(state_dict, "_metadata", {}).get(prefix[:-1])
    if metadata is not None:
        metadata.update(height=matcher.height, width=matcher.width, shared_fc=matcher.shared_fc)


def prepare_loading(
    matcher: QAConv, state_dict: MutableMapping[str, Any], prefix: str, metadata: Mapping[str, Any]
) -> None:
    """Rewrite what is about to be loaded under `prefix`, in place, to what the matcher takes.

    A shared `fc` is converted for a matcher that has none. A class table that is to become the parameter itself gets
    the memory format of the parameter.

    Raises:
        RuntimeError: values that are no tensors or of another shape, or saved from a matcher of another map size.
    """
    weight, locations = state_dict.get(prefix + "fc.weight"), matcher.height * matcher.width
    saved_size = metadata.get("height"), metadata.get("width")
    errors = []
    if _is_ours(metadata) and None not in saved_size and saved_size != (matcher.height, matcher.width):
        errors.append(
            f"size mismatch for {prefix}fc.weight: saved from a matcher of maps {saved_size[0]} x {saved_size[1]}, "
            f"but this one is of maps {matcher.height} x {matcher.width}."
        )
    elif matcher.shared_fc and metadata.get("shared_fc") is False:
        errors.append(f"size mismatch for {prefix}fc.weight: saved from a matcher without shared_fc.")
    elif isinstance(weight, Tensor) and not matcher.shared_fc:
        if tuple(weight.shape) == (1, locations) and (not _is_ours(metadata) or None not in saved_size):
            convert_shared_fc(state_dict, prefix, locations)
            if "version" not in metadata:
                _logger.warning(
                    "%sfc.weight %s without metadata is taken for one of QAConv 2.1, shared by both halves; "
                    "qaconv_triton.convert_checkpoint(state_dict, release='2.1') says so.",
                    prefix,
                    list(weight.shape),
                )
        elif "version" in metadata and not _is_ours(metadata) and tuple(weight.shape) == (1, 2 * locations):
            _logger.warning(
                "%sfc.weight %s is loaded as it is: right for OAML, but QAConv 1.x and 2.0 have the gallery's half "
                "first; qaconv_triton.convert_checkpoint(state_dict, release=...) converts either.",
                prefix,
                list(weight.shape),
            )
    own = matcher.state_dict(keep_vars=True)
    for name, parameter in own.items():
        if prefix + name not in state_dict or not isinstance(parameter, Tensor):
            continue
        value = state_dict[prefix + name]
        if not isinstance(value, Tensor):
            errors.append(f"{prefix}{name}: expected a tensor, got {type(value).__name__}.")
        elif hasattr(value, "device_mesh") and not hasattr(parameter, "device_mesh"):
            errors.append(
                f"{prefix}{name}: sharded over a device mesh, but that of this module is whole; load the checkpoint "
                "into the state dict of this module with torch.distributed.checkpoint."
            )
        elif value.shape != parameter.shape and not (parameter.dim() == 0 and tuple(value.shape) == (1,)):
            errors.append(
                f"size mismatch for {prefix}{name}: copying a param with shape {value.shape} from checkpoint, "
                f"the shape in current model is {parameter.shape}."
            )
    refuse(matcher, errors)
    key = prefix + "class_embed"
    if matcher.mesh is not None and key in state_dict:
        state_dict[key] = sharded.table.own_rows(state_dict[key], own["class_embed"])
    if metadata.get("assign_to_params_buffers") and key in state_dict and not matcher.sparse_grad:
        state_dict[key] = state_dict[key].contiguous(memory_format=torch.channels_last)


def check_keys(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Require the keys of the module's own state dict, before anything is loaded.

    Where hooks may still rename keys, this is left to torch.

    Raises:
        RuntimeError: missing or unexpected keys.
    """
    if any(each._load_state_dict_pre_hooks for each in module.modules()):
        return
    own, metadata = module.state_dict(keep_vars=True), getattr(state_dict, "_metadata", None) or {}

    def is_optional(key: str) -> bool:  # torch fills in the count of old batch norms
        name, _, buffer = key.rpartition(".")
        return buffer == "num_batches_tracked" and (metadata.get(name, {}).get("version") or 0) < 2

    errors = []
    unexpected = [f'"{key}"' for key in state_dict if key not in own]
    missing = [f'"{key}"' for key in own if key not in state_dict and not is_optional(key)]
    if unexpected:
        errors.append(f"Unexpected key(s) in state_dict: {', '.join(unexpected)}.")
    if missing:
        errors.append(f"Missing key(s) in state_dict: {', '.join(missing)}.")
    refuse(module, errors)


def _is_ours(metadata: Mapping[str, Any]) -> bool:
    return (metadata.get("version") or 0) >= VERSION


def refuse(module: nn.Module, errors: list[str]) -> None:
    """Raise a RuntimeError that lists the errors, if there are any, as `nn.Module.load_state_dict` does."""
    if errors:
        text = "\n\t".join(errors)
        raise RuntimeError(f"Error(s) in loading state_dict for {type(module).__name__}:\n\t{text}")
