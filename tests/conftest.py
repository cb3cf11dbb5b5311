"""Fixtures shared by all tests."""

import pytest
import torch

DEVICES = ["cpu", "cuda"]


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device fastgan has kernels for; `pytest -k cuda` runs the CUDA half."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
