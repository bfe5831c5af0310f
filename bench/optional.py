"""A pytest plugin for machines that lack some of the test packages: what needs them is skipped, all else runs.

`python -m pytest -p bench.optional`, as the GPU check does. A development environment has them all (`.[dev]`).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

# test files that need more than their tests of properties do
NEEDS = {
    "test_demo.py": ("matplotlib", "numpy", "torchmetrics", "tqdm"),
    "test_report.py": ("matplotlib", "numpy"),
    "test_sampler.py": ("numpy",),
}


def missing() -> list[str]:
    """The optional packages that are not installed."""
    names = {"hypothesis", "pytest_benchmark", *(name for packages in NEEDS.values() for name in packages)}
    return sorted(name for name in names if importlib.util.find_spec(name) is None)


def without_hypothesis() -> ModuleType:
    """A module in its place: tests of properties are skipped, the others of their files run."""
    module: Any = ModuleType("hypothesis")
    module.__spec__ = ModuleSpec("hypothesis", None)  # torch looks for it
    module.strategies = module.HealthCheck = MagicMock()

    def given(*_: object, **__: object) -> Callable[..., Any]:
        return pytest.mark.skip(reason="needs hypothesis")

    def settings(*_: object, **__: object) -> Callable[..., Any]:
        return lambda test: test

    module.given, module.settings = given, settings
    return module


MISSING = missing()
if "hypothesis" in MISSING:
    sys.modules["hypothesis"] = without_hypothesis()


def pytest_configure(config: pytest.Config) -> None:
    """Markers are strict: this one is pytest-benchmark's."""
    if "pytest_benchmark" in MISSING:
        config.addinivalue_line("markers", "benchmark: a perf check")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A file that cannot be imported, or whose tests would all fail."""
    return True if set(NEEDS.get(collection_path.name, ())) & set(MISSING) else None
