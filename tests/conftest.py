"""Fixtures shared by all tests."""

import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DEVICES = ["cpu", "cuda"]


def pytest_runtest_setup(item):
    needs_sources = item.get_closest_marker("sources") or "setup_script" in item.fixturenames
    if needs_sources and not (ROOT / "setup.py").is_file():
        pytest.skip("no sources beside the tests")


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Every device fastgan has kernels for; `pytest -k cuda` runs the CUDA half, in exact float32.

    cuDNN and fastgan take TF32 for different shapes, so with it their errors could not be compared.
    """
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)


@pytest.fixture(scope="session")
def setup_script():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("fastgan_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
