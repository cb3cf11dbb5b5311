"""Fixtures shared by all tests."""

import importlib.util
import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has as many threads as there are cores, and OpenMP's would wait for each other by spinning: a test of
    # many small operators takes 10 times as long. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path

import pytest
import torch
from filelock import FileLock

from fastgan import _extension

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


@pytest.fixture
def same_thread_count_after_the_test():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def setup_script():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("fastgan_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CUDA_HOST_OPERATORS = [
    "conv_act_forward", "conv_act_backward", "conv_bn_act_forward", "conv_bn_act_backward",
    "conv_stack_forward", "conv_stack_backward", "softmax_entropy_forward", "softmax_entropy_backward",
]  # fmt: skip
CUDA_HOST_SOURCES = [
    "csrc/ops/cuda_conv_bn_act.cpp", "csrc/ops/convolution.cpp", "csrc/ops/conv_bn_act_checks.cpp",
    "csrc/ops/cuda_conv_stack.cpp", "csrc/ops/cuda_conv_stack_plan.cpp", "csrc/ops/conv_stack_layers.cpp",
    "csrc/ops/cuda_softmax_entropy.cpp", "csrc/ops/softmax_entropy_shared.cpp",
    "csrc/cuda/conv4x4s2.cu", "csrc/cuda/bn_act.cu", "csrc/cuda/softmax_entropy.cu", "csrc/cuda/host/fibers.cpp",
    "tests/native/cuda/conv_ops.cpp",
]  # fmt: skip


@pytest.fixture(scope="session")
def cuda_host(tmp_path_factory):
    """torch.ops.fastgan_cuda_host: operators on CUDA, for tensors on the CPU, with their kernels on the
    host shim and the schemas of torch.ops.fastgan. Under pytest-xdist the first worker compiles them for all."""
    from test_cuda_host import load_operators

    if not _extension.has_kernels("cpu"):
        pytest.skip("needs the compiled extension")
    library = torch.library.Library("fastgan_cuda_host", "FRAGMENT")
    for name in CUDA_HOST_OPERATORS:
        library.define(str(getattr(torch.ops.fastgan, name).default._schema).removeprefix("fastgan::"))
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "cuda_host.lock"):
        load_operators(CUDA_HOST_SOURCES, folder / "cuda_host")
    yield torch.ops.fastgan_cuda_host
