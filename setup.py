"""The build authority of fastgan: decides what is compiled, against which PyTorch, and prints why.

Environment variables
    FASTGAN_CUDA=0|1       never / always build the CUDA kernels (default: if PyTorch has CUDA and nvcc is there)
    TORCH_CUDA_ARCH_LIST   CUDA architectures (default: 8.0;8.6;8.9+PTX;9.0a)
    CUDA_HOME              the CUDA toolkit (default: that of the nvcc on PATH, then /usr/local/cuda)
    CXX, MAX_JOBS          the C++ compiler; compilers at once
"""

import importlib.util
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
VERSION = "0.1.0"
TESTED_TORCH = "2.13.0"  # what an environment without PyTorch gets
OLDEST_TORCH = (2, 10)
# PTX of 8.9, for GPUs to come.
CUDA_ARCHITECTURES = "8.0;8.6;8.9+PTX;9.0a"
DEPENDENCIES = ["numpy", "pillow", "matplotlib", "tqdm", "scipy"]

# Flags of every torch-free kernel, and of each instruction set (csrc/cpu/isa.h). CMakeLists.txt repeats them;
# tests/test_build.py keeps the two equal.
KERNEL_FLAGS = [
    "-O3", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
X86_ISAS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX}


def main():
    if not make_environment_torch_visible():
        return setup_without_torch(sys.argv[1:])
    toolkit, nvcc_version = find_cuda_toolkit()
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit)  # torch.utils.cpp_extension reads it when imported
    import torch

    check_torch(torch.__version__)
    architectures = cuda_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES)
    cuda, cuda_reason = decide_cuda(
        os.environ.get("FASTGAN_CUDA", ""), torch.__version__, torch.version.cuda, toolkit, nvcc_version, architectures
    )
    if cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures)
    config = {
        "VERSION": VERSION,
        "TORCH_VERSION": torch.__version__,
        "CUDA_VERSION": torch.version.cuda if cuda else None,
        "CUDA_ARCHITECTURES": architectures if cuda else (),
        "CUDA_KERNELS": cuda,
        "CUDA_REASON": cuda_reason,
    }
    say(f"building {VERSION} against PyTorch {torch.__version__} ({Path(torch.__file__).parent})")
    say(f"CPU kernels for {', '.join(isas())}")
    say(f"CUDA kernels: {'yes, for ' + ', '.join(config['CUDA_ARCHITECTURES']) if cuda else 'no'} ({cuda_reason})")
    setup(
        version=VERSION,
        ext_modules=[extension(cuda)],
        cmdclass={"build_ext": build_command(config)},
        install_requires=[f"torch=={release(torch.__version__)}", *DEPENDENCIES],
    )


def say(message):
    print(f"fastgan: {message}", file=sys.stderr, flush=True)


# ---- which PyTorch -----------------------------------------------------------------------------------------------


def make_environment_torch_visible():
    """Under build isolation the environment's packages are hidden; the PyTorch to build against is there."""
    if importlib.util.find_spec("torch") is not None:
        return True
    candidates = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    if not sys.flags.no_user_site:
        candidates.append(site.getusersitepackages())
    if Path(sys.prefix).name.startswith("build-env-"):
        # pip hides the packages of the environment it runs in; `python -m build` runs setup.py in a new environment,
        # from which only the activated one can be found.
        for prefix in filter(None, (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"))):
            candidates.append(sysconfig.get_path("platlib", vars={"base": prefix, "platbase": prefix}))
    for folder in candidates:
        if folder and (Path(folder) / "torch" / "version.py").is_file():
            sys.path.append(folder)
            importlib.invalidate_caches()
            return True
    return False


def setup_without_torch(command):
    """A builder first asks, by egg_info, what the build requires, and comes back with that installed. The sources
    alone are packed without PyTorch."""
    if command[:1] == ["sdist"]:
        return setup(version=VERSION, install_requires=DEPENDENCIES)
    if "egg_info" not in command:
        raise SystemExit(
            f"fastgan is built against an installed PyTorch, and this environment has none: "
            f"`pip install torch=={TESTED_TORCH}`, or let pip fetch it by `pip install .` with build isolation"
        )
    say(f"no PyTorch in this environment: building against {TESTED_TORCH}")
    setup(version=VERSION, setup_requires=[f"torch=={TESTED_TORCH}"])


def release(version):
    return version.split("+")[0]


def check_torch(version):
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise SystemExit(f"fastgan needs PyTorch {'.'.join(map(str, OLDEST_TORCH))} or newer, found {version}")


# ---- CUDA or not -------------------------------------------------------------------------------------------------


def find_cuda_toolkit():
    """(folder of the CUDA toolkit, version of its nvcc), or (None, None)."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = [Path(home) / "bin" / "nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for nvcc in found:
        if nvcc is not None and Path(nvcc).is_file():
            # nvcc knows its toolkit; its own path may be that of a wrapper or a link.
            dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
            top = re.search(r"^#\$ TOP=(.+)$", dry_run.stdout + dry_run.stderr, re.MULTILINE)
            version = re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))
            if version:
                return Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1], version[1]
    return None, None


def cuda_architectures(asked):
    """What is compiled for those in TORCH_CUDA_ARCH_LIST: none below 8.0, which has no arithmetic in bfloat16, and 9.0 as 9.0a, whose
    code runs on the same GPUs and has the kernels for Hopper. Names, such as Ampere, are PyTorch's to read."""
    chosen = []
    for architecture in filter(None, re.split(r"[ ;]+", asked)):
        version, _, ptx = architecture.partition("+")
        if re.fullmatch(r"\d+\.\d+", version) and float(version) < 8:
            say(f"not compiled for {architecture}: the CUDA kernels need 8.0 or more")
        elif version == "9.0":
            chosen += ["9.0a", *(["8.9+PTX"] if ptx else [])]  # the PTX of 9.0a runs on no other architecture
        else:
            chosen.append(architecture)
    return tuple(dict.fromkeys(chosen))


def decide_cuda(wanted, torch_version, torch_cuda, toolkit, nvcc_version, architectures):
    """(build the CUDA kernels?, why).

    Args:
        wanted: FASTGAN_CUDA: "0", "1" or "".
        torch_version, torch_cuda: of the PyTorch to build against; its CUDA version is None for a CPU build.
        toolkit, nvcc_version: as find_cuda_toolkit returns them.
        architectures: as cuda_architectures returns them.
    """
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"fastgan: FASTGAN_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return False, "FASTGAN_CUDA=0"
    if torch_cuda is None:
        possible = False
        why = (
            f"PyTorch {torch_version} is a build without CUDA; install one with CUDA, for example "
            f"`pip install --force-reinstall torch=={release(torch_version)} --index-url https://pypi.org/simple`"
        )
    elif toolkit is None:
        possible, why = False, f"nvcc was not found; install the CUDA toolkit {torch_cuda}, or set CUDA_HOME to it"
    elif nvcc_version.split(".")[0] != torch_cuda.split(".")[0]:
        possible = False
        why = (
            f"PyTorch {torch_version} is built with CUDA {torch_cuda}, but the toolkit in {toolkit} is "
            f"{nvcc_version}; install the CUDA toolkit {torch_cuda}, or set CUDA_HOME to it"
        )
    elif not architectures:
        possible, why = False, "TORCH_CUDA_ARCH_LIST has none of 8.0 or more, which the CUDA kernels need"
    else:
        possible, why = True, f"PyTorch is built with CUDA {torch_cuda}, nvcc {nvcc_version} is in {toolkit}"
    if wanted == "1" and not possible:
        raise SystemExit(f"fastgan: FASTGAN_CUDA=1, but {why}")
    return possible, why


# ---- what is compiled --------------------------------------------------------------------------------------------


def isas():
    return X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}


def sources(cuda):
    """Everything but the kernels of csrc/cpu, which are compiled once for each of their instruction sets (kernel_jobs)."""
    operators = sorted((ROOT / "csrc" / "ops").glob("*.cpp"))
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    chosen = [*operators, *kernels] if cuda else [path for path in operators if not path.name.startswith("cuda")]
    return ["csrc/library.cpp", "csrc/recording.cpp", *(path.relative_to(ROOT).as_posix() for path in chosen)]


def units(sources):
    """{file: the C++ sources it includes}: what is compiled in place of them. Most of a compilation goes to PyTorch's
    headers, so that two units take a quarter of the time of one for each source; on more cores there are up to four. The
    operators on CUDA have their own."""
    sources = [source for source in sources if source.endswith(".cpp")]
    cuda = [source for source in sources if Path(source).name.startswith("cuda")]
    cpu = [source for source in sources if source not in cuda]
    count = min(max(2, compilers_at_once()), 4)
    groups = {f"cpu{i}.cpp": cpu[i::count] for i in range(count)} | {"cuda.cpp": cuda}
    return {name: group for name, group in groups.items() if group}


def write_units(sources, folder):
    """Writes units() into folder, and returns all that is to be compiled."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, group in units(sources).items():
        text = "".join(f'#include "{ROOT / source}"\n' for source in group)
        unit = folder / name
        if not unit.is_file() or unit.read_text() != text:  # what is older than its object is not compiled again
            unit.write_text(text)
        written.append(str(unit))
    return [*written, *(source for source in sources if not source.endswith(".cpp"))]


def extension(cuda):
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    # at::parallel_for is a template that is serial without -fopenmp. Its runtime is the one PyTorch has loaded, so
    # nothing is linked: a second OpenMP runtime would mean a second pool of threads. Clang would call another than GCC's
    # (csrc/library.cpp calls that one itself).
    openmp = [] if is_clang(find_compiler()) else ["-fopenmp"]
    arguments = {"cxx": ["-O2", "-g0", *openmp, "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]}
    compiled = sources(cuda)
    if cuda:
        # Ninja compiles the sources side by side, and what cores are left each source's architectures.
        threads = max(1, compilers_at_once() // sum(source.endswith(".cu") for source in compiled))
        arguments["nvcc"] = ["-O3", "--expt-relaxed-constexpr", f"--threads={threads}"]
        if "9.0a" in os.environ["TORCH_CUDA_ARCH_LIST"]:
            arguments["nvcc"].append("-DFASTGAN_HOPPER")  # csrc/cuda/hopper.cuh
    return (CUDAExtension if cuda else CppExtension)("fastgan._C", compiled, extra_compile_args=arguments)


def compilers_at_once():
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def find_compiler():
    """The command of the C++ compiler, as a list."""
    command = os.environ.get("CXX", "c++").split()
    if not command or shutil.which(command[0]) is None:
        raise SystemExit(
            f"fastgan: no C++ compiler: CXX is {os.environ['CXX']!r}, which is not on PATH"
            if "CXX" in os.environ
            else "fastgan: no C++ compiler: c++ is not on PATH; install one (Debian, Ubuntu: `apt install g++ python3-dev`; "
            "conda: `conda install gxx_linux-64`), or set CXX to it"
        )
    return command


def is_clang(compiler):
    return "clang" in subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout


def instruction_sets(kernel):
    """Those that the first line of a *_kernel.cpp lists."""
    line = kernel.read_text().partition("\n")[0]
    head, _, names = line.partition(": ")
    if head != "// Instruction sets" or not names or not set(names.split()) <= set(X86_ISAS):
        raise SystemExit(
            f"fastgan: the first line of {kernel.relative_to(ROOT)} must be `// Instruction sets: ` and some of "
            f"{' '.join(X86_ISAS)}, is {line!r}"
        )
    return names.split()


def kernel_jobs(out):
    """(source, object file, flags) for every compilation of csrc/cpu."""
    jobs = []
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if source.stem.endswith("_kernel"):
            for isa in instruction_sets(source):
                if isa in isas():
                    flags = [f"-DFASTGAN_ISA={isa}", *KERNEL_FLAGS, *X86_ISAS[isa], "-std=c++17"]
                    jobs.append((source, out / f"{source.stem}.{isa}.o", flags))
        else:
            jobs.append((source, out / f"{source.stem}.o", [*KERNEL_FLAGS, "-std=c++17"]))
    return jobs


def build_command(config):
    from torch.utils.cpp_extension import BuildExtension

    class BuildFastgan(BuildExtension):
        """Compiles the torch-free CPU kernels, then leaves the rest to PyTorch's builder."""

        def finalize_options(self):
            super().finalize_options()
            self.force = True  # what is compiled and linked follows from more than the files that setuptools looks at

        def build_extensions(self):
            compiler = find_compiler()
            out = Path(self.build_temp).resolve() / "kernels"
            out.mkdir(parents=True, exist_ok=True)
            jobs = kernel_jobs(out)

            def compile_kernel(job):
                source, target, flags = job
                subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(target)], check=True)

            with ThreadPoolExecutor(compilers_at_once()) as pool:
                list(pool.map(compile_kernel, jobs))
            for extension in self.extensions:
                extension.sources = write_units(extension.sources, out.parent / "units")
                extension.extra_objects = [str(target) for _, target, _ in jobs]
            super().build_extensions()
            write_build_config(Path(self.build_lib) / "fastgan", config)

        def copy_extensions_to_source(self):  # editable and in-place installs
            super().copy_extensions_to_source()
            write_build_config(ROOT / "fastgan", config)

    return BuildFastgan


def write_build_config(package, config):
    """What fastgan.build_info() says about this build."""
    lines = "".join(f"{name} = {value!r}\n" for name, value in config.items())
    (package / "_build_config.py").write_text(f'"""Written by setup.py."""\n\n{lines}')


if __name__ == "__main__":
    main()
