"""The CUDA kernels' logic, without a GPU: their sources compiled for the host (csrc/cuda/host) and compared with
naive float64 references, under the address and undefined-behaviour sanitizers and three orders of threads."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "-std=c++17 -DFASTGAN_CUDA_HOST -O1 -g -Wall -Wextra -Werror -Wno-unknown-pragmas -fno-strict-aliasing "
    "-ftrivial-auto-var-init=pattern -fsanitize=address,undefined -fno-sanitize-recover=all"
).split()

pytestmark = [
    pytest.mark.sources,
    pytest.mark.skipif(
        platform.machine() != "x86_64" or platform.system() != "Linux" or shutil.which("g++") is None,
        reason="the host shim needs g++ on x86-64 Linux",
    ),
]


@pytest.mark.parametrize("stem", ["bn_act", "softmax_entropy", "adam", "conv4x4s2"])
def test_cuda_kernels_equal_float64_reference_under_every_thread_order(stem, tmp_path):
    executable = tmp_path / stem
    build = subprocess.run(
        [
            *os.environ.get("CXX", "g++").split(),
            *FLAGS,
            "-x",
            "c++",
            ROOT / f"csrc/cuda/{stem}.cu",
            ROOT / "csrc/cuda/host/fibers.cpp",
            ROOT / f"tests/native/cuda/test_{stem}.cpp",
            "-o",
            executable,
        ],
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    run = subprocess.run([executable], capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
