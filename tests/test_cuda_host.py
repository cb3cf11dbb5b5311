"""The CUDA kernels' logic, without a GPU: their sources compiled for the host (csrc/cuda/host) and compared with
naive float64 references, under the address and undefined-behaviour sanitizers and several orders of threads."""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "-std=c++17 -DFASTGAN_CUDA_HOST -O1 -g1 -Wall -Wextra -Werror -Wno-unknown-pragmas -fno-strict-aliasing "
    "-ftrivial-auto-var-init=pattern -fsanitize=address,undefined -fno-sanitize-recover=all "
    "-fno-sanitize=null,object-size,pointer-overflow"  # what the address sanitizer finds as well, for a fifth of the time
).split()

pytestmark = [
    pytest.mark.sources,
    pytest.mark.skipif(
        platform.machine() != "x86_64" or platform.system() != "Linux" or shutil.which("g++") is None,
        reason="the host shim needs g++ on x86-64 Linux",
    ),
]


OPERATOR_FLAGS = (
    "-x c++ -std=c++20 -DFASTGAN_CUDA_HOST -O1 -fPIC -fvisibility=hidden -fno-strict-aliasing -Wall -Wextra -Werror "
    "-Wno-unknown-pragmas -ftrivial-auto-var-init=pattern"
).split()


def load_operators(sources, folder):
    """Loads CUDA operators and their kernels (paths from ROOT), compiled for the host, for tensors on the CPU; compiles them
    in `folder` unless that has them."""
    compiler = os.environ.get("CXX", "g++").split()
    includes = [flag for path in include_paths() for flag in ("-isystem", path)]

    def compile(source):
        target = folder / f"{str(source).replace('/', '_')}.o"
        run = subprocess.run(
            [*compiler, *OPERATOR_FLAGS, *includes, "-c", ROOT / source, "-o", target], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        return target

    library = folder / "library.so"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        operators = [source for source in sources if source.startswith("csrc/ops/")]
        unit = folder / "operators.cpp"  # most of their compilation goes to PyTorch's headers
        unit.write_text("".join(f'#include "{ROOT / source}"\n' for source in operators))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile, [unit, *(source for source in sources if source not in operators)]))
        libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
        subprocess.run(
            [*compiler, "-shared", *objects, *libraries, "-lc10", "-ltorch", "-ltorch_cpu", "-o", library], check=True
        )
    torch.ops.load_library(library)


@pytest.mark.parametrize("stem", sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")))
def test_cuda_kernels_equal_float64_reference_in_any_order_of_threads(stem, tmp_path):
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
