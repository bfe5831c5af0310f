"""A class table that is sharded over the ranks of a device mesh: how it starts (`table`), its graph, its scores.

The modules load when they are used, for `torch.distributed.tensor` takes as long to import as much of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import graph, scores, table

__all__ = ["graph", "scores", "table"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f".{name}", __name__)
