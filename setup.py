"""The build authority of fastgan: decides what is compiled, against which PyTorch, and prints why.

Environment variables
    FASTGAN_CUDA=0|1       never / always build the CUDA kernels (default: if PyTorch has CUDA and nvcc is there)
    TORCH_CUDA_ARCH_LIST   CUDA architectures (default: 8.0;8.6;8.9;9.0a+PTX)
    MAX_JOBS               compilers at once
"""

import importlib.util
import os
import platform
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
VERSION = "0.1.0"
TESTED_TORCH = "2.13.0"  # what a machine without PyTorch gets
OLDEST_TORCH = (2, 10)
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0a+PTX"

# Flags of every torch-free kernel, and of each instruction set (csrc/cpu/isa.h). CMakeLists.txt repeats this table;
# tests/test_build.py keeps the two equal.
KERNEL_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
X86_ISAS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX}


def say(message):
    print(f"fastgan: {message}", file=sys.stderr, flush=True)


def make_environment_torch_visible():
    """Under pip's build isolation the environment's packages are hidden; the PyTorch to build against is there."""
    if importlib.util.find_spec("torch") is not None:
        return True
    candidates = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    if not sys.flags.no_user_site:
        candidates.append(site.getusersitepackages())
    for folder in candidates:
        if folder and (Path(folder) / "torch" / "version.py").is_file():
            sys.path.append(folder)
            importlib.invalidate_caches()
            return True
    return False


if not make_environment_torch_visible():
    # pip asks for the requirements of the build first; it calls again with this PyTorch installed.
    say(f"no PyTorch in this environment: building against {TESTED_TORCH}")
    setup(version=VERSION, setup_requires=[f"torch=={TESTED_TORCH}"])
    sys.exit(0)

import torch  # noqa: E402
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402

TORCH_RELEASE = torch.__version__.split("+")[0]
if tuple(int(part) for part in TORCH_RELEASE.split(".")[:2]) < OLDEST_TORCH:
    raise SystemExit(f"fastgan needs PyTorch {'.'.join(map(str, OLDEST_TORCH))} or newer, found {torch.__version__}")


def decide_cuda():
    """(build the CUDA kernels?, why)."""
    wanted = os.environ.get("FASTGAN_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"FASTGAN_CUDA must be 0, 1 or unset, got {wanted!r}")
    if not list((ROOT / "csrc" / "cuda").glob("*.cu")):
        possible, why = False, "this version of fastgan has no CUDA kernels"
    elif torch.version.cuda is None:
        possible, why = False, f"PyTorch {torch.__version__} is a build without CUDA; install a CUDA build of it"
    elif CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").is_file():
        possible, why = False, f"nvcc was not found; install the CUDA toolkit {torch.version.cuda} or set CUDA_HOME"
    else:
        possible, why = True, f"PyTorch is built with CUDA {torch.version.cuda} and nvcc is in {CUDA_HOME}"
    if wanted == "1" and not possible:
        raise SystemExit(f"FASTGAN_CUDA=1, but {why}")
    if wanted == "0":
        return False, "FASTGAN_CUDA=0"
    return possible, why


def isas():
    return X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}


class BuildFastgan(BuildExtension):
    """Compiles the torch-free CPU kernels once per instruction set, then leaves the rest to PyTorch's builder."""

    def build_extensions(self):
        compiler = os.environ.get("CXX", "c++").split()
        out = Path(self.build_temp).resolve() / "kernels"
        out.mkdir(parents=True, exist_ok=True)
        jobs = []
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            if source.stem.endswith("_kernel"):
                for isa, flags in isas().items():
                    jobs.append((source, out / f"{source.stem}.{isa}.o", [*flags, f"-DFASTGAN_ISA={isa}"]))
            else:
                jobs.append((source, out / f"{source.stem}.o", []))

        def compile_kernel(job):
            source, target, flags = job
            subprocess.run([*compiler, *KERNEL_FLAGS, *flags, "-c", str(source), "-o", str(target)], check=True)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(compile_kernel, jobs))
        for extension in self.extensions:
            extension.extra_objects = [str(target) for _, target, _ in jobs]
        super().build_extensions()
        self.write_build_config(Path(self.build_lib) / "fastgan")

    def copy_extensions_to_source(self):  # editable and in-place installs
        super().copy_extensions_to_source()
        self.write_build_config(ROOT / "fastgan")

    def write_build_config(self, package):
        """What fastgan.build_info() says about this build."""
        (package / "_build_config.py").write_text(
            '"""Written by setup.py."""\n\n'
            f"VERSION = {VERSION!r}\nTORCH_VERSION = {torch.__version__!r}\n"
            f"CUDA_VERSION = {torch.version.cuda if CUDA else None!r}\n"
            f"CUDA_ARCHITECTURES = {tuple(os.environ['TORCH_CUDA_ARCH_LIST'].split(';')) if CUDA else ()!r}\n"
            f"CUDA_KERNELS = {CUDA!r}\nCUDA_REASON = {CUDA_REASON!r}\n"
        )


CUDA, CUDA_REASON = decide_cuda()
say(f"building {VERSION} against PyTorch {torch.__version__} ({Path(torch.__file__).parent})")
say(f"CPU kernels for {', '.join(isas())}")
say(f"CUDA kernels: {'yes' if CUDA else 'no'} ({CUDA_REASON})")

sources = ["csrc/library.cpp", *(f"csrc/ops/{path.name}" for path in sorted((ROOT / "csrc" / "ops").glob("*.cpp")))]
compile_args = {"cxx": ["-O2", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]}
if CUDA:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    say(f"CUDA architectures: {os.environ['TORCH_CUDA_ARCH_LIST']}")
    sources += [f"csrc/cuda/{path.name}" for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    compile_args["cxx"].append("-DFASTGAN_WITH_CUDA")
    compile_args["nvcc"] = ["-O3", "-DFASTGAN_WITH_CUDA", "--expt-relaxed-constexpr"]
else:
    sources = [source for source in sources if not Path(source).name.startswith("cuda_")]

setup(
    version=VERSION,
    ext_modules=[(CUDAExtension if CUDA else CppExtension)("fastgan._C", sources, extra_compile_args=compile_args)],
    cmdclass={"build_ext": BuildFastgan},
    install_requires=[f"torch=={TORCH_RELEASE}", "numpy", "pillow", "matplotlib", "tqdm", "scipy"],
)
