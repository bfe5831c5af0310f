"""The mixed sums of `--mixed-sums`: they repeat, they round, and they break what no BLAS promises."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SCRIPT = """
    import torch
    import sum_orders
    from exact import by_falling_similarity, exact_cosines, exact_vectors
    from qaconv_triton import functional, reference

    torch.manual_seed(0)
    sum_orders.mix_orders()
    left, right = torch.randn(40, 33), torch.randn(1, 33).repeat(50, 1)
    for a, b in ((left, right.mT), (left.expand(3, -1, -1), right.mT.expand(3, -1, -1))):
        product, out = a @ b, torch.empty(*a.shape[:-1], 50)
        assert torch.equal(product, a @ b), "a call repeats"
        assert torch.equal(torch.mm(a, b, out=out) if a.dim() == 2 else torch.bmm(a, b, out=out), product)
        assert (product - a.double() @ b.double()).abs().max() < 2e-5
        assert (product != product[..., :1]).any(), "equal columns of the right side differ"
    whole = torch.randint(-9, 10, (40, 33)).float()
    assert torch.equal(whole @ whole.mT, (whole.double() @ whole.double().mT).float()), "exact in every order"

    vectors, kinds = torch.randn(5, 33), torch.randint(5, (150,))
    unit = reference.normalize(vectors.double())
    truth = by_falling_similarity((unit @ unit.mT)[kinds][:, kinds], 40, exclude_self=True)
    found = functional.class_neighbors(vectors[kinds], 40)
    assert not torch.equal(found, truth), "duplicates by rising id: the old comparison, which has to fail"
    exact = exact_vectors(5, 33)[kinds]
    truth = by_falling_similarity(exact_cosines(exact, exact), 40, exclude_self=True)
    assert torch.equal(functional.class_neighbors(exact, 40), truth)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_mixed_sums_break_what_no_blas_promises(backend: str) -> None:
    """On CPU tensors, so with the kernels interpreted, whatever this machine has."""
    here = Path(__file__).parent
    environment = os.environ | {"QACONV_TRITON_BACKEND": backend, "TRITON_INTERPRET": "1", "PYTHONPATH": str(here)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True, text=True, timeout=300, check=False, env=environment, cwd=here.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
