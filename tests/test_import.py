"""What an import loads, what work on the CPU leaves alone, and a library without Triton."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from qaconv_triton import QAConv, SoftmaxTripletLoss, functional


def test_an_import_loads_no_compiler() -> None:
    """Every worker of a data loader pays for what an import pulls in: torch's compiler takes seconds."""
    script = (
        "import sys, torch; before = set(sys.modules); import qaconv_triton; "
        "print(*(name for name in ('torch._dynamo', 'torch._inductor', 'sympy', 'triton', 'numpy')"
        " if name in set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_a_step_loads_no_compiler() -> None:
    script = """
        import sys, torch
        from qaconv_triton import QAConv, SoftmaxTripletLoss

        maps = torch.randn(4, 8, 2, 2, requires_grad=True)
        SoftmaxTripletLoss(QAConv(8, 2, 2, 6, 3))(maps, torch.tensor([0, 0, 1, 1]))[2].mean().backward()
        assert maps.grad.abs().max() > 0
        print("torch._dynamo" in sys.modules)
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_work_on_the_cpu_asks_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a context on the first GPU every process would pay for the memory, and a forked worker cannot have one."""
    asked: list[str] = []
    for name in ("current_device", "get_device_capability", "get_device_properties", "mem_get_info", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    losses = SoftmaxTripletLoss(QAConv(8, 2, 2, num_classes=60, k_nearest=5))
    features = torch.randn(8, 8, 2, 2, requires_grad=True)
    losses.matcher.compute_class_neighbors()
    losses(features, torch.arange(8) // 2)[2].mean().backward()
    losses.matcher.match(features.detach(), features.detach())
    functional.topk_cosine(torch.randn(9, 4), torch.randn(30, 4), 3)
    functional.class_neighbors(torch.randn(30, 4), 3, rescore=True)
    assert not asked


def test_a_clone_works_where_the_package_is_installed_elsewhere_or_not_at_all() -> None:
    """`pip install .`, and then Python in the clone: what lies here comes first."""
    script = """
        import sys

        sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
        import pkgutil, torch, qaconv_triton
        from qaconv_triton import QAConv, kernels

        assert QAConv(4, 2, 2).match(*torch.randn(2, 3, 4, 2, 2)).shape == (3, 3)
        assert "bench" not in [name for _, name, _ in pkgutil.iter_modules(qaconv_triton.__path__)]
        print(*kernels.__path__)
    """
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(root / "kernels")


def test_the_library_works_without_triton() -> None:
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


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("integrations.lightning", "lightning", "lightning"),
        ("integrations.metric_learning", "pytorch_metric_learning", "metric-learning"),
        ("plots", "matplotlib", "plot"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    module: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"qaconv_triton.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"qaconv_triton\.{module} needs .*: pip install qaconv-triton\[{extra}\]$"):
        importlib.import_module(f"qaconv_triton.{module}")
