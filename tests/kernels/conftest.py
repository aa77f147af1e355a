"""Triton's interpreter runs kernels on CPU tensors; it must be asked for before Triton loads."""

import os
from importlib.metadata import version

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def interpreter():
    """(kv_int8_triton, decode_attention_triton), interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed: no kernel can be interpreted")
    triton, numpy = (tuple(map(int, version(x).split(".")[:2])) for x in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        pytest.skip("Triton 3.6's interpreter takes an array for a number, NumPy 2.4 does not")
    from qwq_kernels import decode_attention_triton, kv_int8_triton

    if decode_attention_triton.PTX:
        pytest.fail("Triton was loaded before TRITON_INTERPRET=1 was set; tests/conftest.py must")
    return kv_int8_triton, decode_attention_triton


@pytest.fixture
def poisoned_memory():
    """Whatever torch.empty returns is full of NaN, or of the largest integer."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before
