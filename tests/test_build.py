"""The build: setup.py's decisions, its agreement with CMakeLists.txt, what an installation says about itself, and the
native tests of the torch-free kernels."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastgan
from fastgan import _extension

ROOT = Path(__file__).resolve().parent.parent


def run_setup(tmp_path, *command, **environment):
    """setup.py in a process of its own; what it writes goes to tmp_path."""
    return subprocess.run(
        [sys.executable, str(ROOT / "setup.py"), *command], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, **environment},
    )  # fmt: skip


# ---- with or without CUDA ----------------------------------------------------------------------------------------

CPU_TORCH = ("2.13.0+cpu", None)
CUDA_TORCH = ("2.11.0+cu130", "13.0")
TOOLKIT = (Path("/usr/local/cuda"), "13.0")
NO_TOOLKIT = (None, None)


@pytest.mark.parametrize("wanted", ["", "1"])
def test_cuda_torch_with_nvcc_builds_cuda_kernels_without_asking_for_a_gpu(setup_script, monkeypatch, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    cuda, why = setup_script.decide_cuda(wanted, *CUDA_TORCH, *TOOLKIT, ("8.0",))
    assert cuda and "13.0" in why


@pytest.mark.parametrize(
    "pytorch, toolkit, architectures, why",
    [
        (CPU_TORCH, TOOLKIT, ("8.0",), r"2\.13\.0\+cpu is a build without CUDA; install one with CUDA.*pip install --force-reinstall torch==2\.13\.0 "),
        (CUDA_TORCH, NO_TOOLKIT, ("8.0",), "nvcc was not found; install the CUDA toolkit 13.0"),
        (CUDA_TORCH, (Path("/opt/cuda-12"), "12.4"), ("8.0",), "built with CUDA 13.0, but the toolkit in /opt/cuda-12 is 12.4"),
        (CUDA_TORCH, TOOLKIT, (), "TORCH_CUDA_ARCH_LIST has none of 8.0 or more"),
    ],
    ids=["torch for the CPU", "no nvcc", "nvcc of another CUDA", "old GPUs"],
)
def test_without_cuda_the_cpu_kernels_are_built_and_only_asking_for_cuda_is_an_error(setup_script, pytorch, toolkit, architectures, why):
    cuda, reason = setup_script.decide_cuda("", *pytorch, *toolkit, architectures)
    assert not cuda and re.search(why, reason)
    with pytest.raises(SystemExit, match="FASTGAN_CUDA=1, but .*" + why):
        setup_script.decide_cuda("1", *pytorch, *toolkit, architectures)
    assert setup_script.decide_cuda("0", *pytorch, *toolkit, architectures) == (False, "FASTGAN_CUDA=0")


@pytest.mark.parametrize("asked, compiled", [
    ("8.0;8.6;8.9+PTX;9.0a", ("8.0", "8.6", "8.9+PTX", "9.0a")),
    ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", ("8.0", "8.6", "9.0a", "10.0", "12.0+PTX")),
    ("9.0+PTX;9.0a", ("9.0a", "8.9+PTX")),
    ("7.0;7.5", ()),
    ("Ampere", ("Ampere",)),
])  # fmt: skip
def test_architectures_that_are_compiled(setup_script, asked, compiled):
    assert setup_script.cuda_architectures(asked) == compiled


@pytest.mark.parametrize("capability, runs", [((7, 5), False), ((8, 0), True), ((8, 6), True), ((8, 7), True), ((9, 0), True),
                                              ((9, 1), False), ((12, 0), False)])  # fmt: skip
def test_gpus_that_code_for_an_architecture_runs_on(capability, runs):
    assert (_extension._why_not_on("GPU", capability, ("8.0", "8.6", "9.0a")) is None) == runs
    assert (_extension._why_not_on("GPU", capability, ("8.9+PTX", "9.0a")) is None) == (capability >= (8, 9))
    assert _extension._why_not_on("GPU", capability, ("Ampere",)) is None


def test_a_gpu_without_kernels_is_left_to_pytorch_with_the_reason(monkeypatch):
    monkeypatch.setattr(_extension, "_DEVICES", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(_extension, "_warned", set())
    monkeypatch.setattr(_extension, "_gpus", {1: _extension._why_not_on("Tesla T4", (7, 5), ("8.0", "9.0a"))})
    device, said = torch.device("cuda", 1), "compiled for compute capability 8.0, 9.0a, and the Tesla T4 has 7.5; they need 8.0 or more"
    with pytest.warns(RuntimeWarning, match="fastgan runs conv2d_act in plain PyTorch: the CUDA kernels are " + said):
        assert not _extension.runs_fused("conv2d_act", SimpleNamespace(device=device, is_cpu=False))
    assert not _extension.runs_on(device) and _extension.runs_on(torch.device("cpu"))  # said once
    monkeypatch.setenv("FASTGAN_STRICT", "1")
    with pytest.raises(RuntimeError, match="FASTGAN_STRICT=1.*Tesla T4"):
        _extension.runs_on(device)


def test_fastgan_cuda_takes_0_and_1_only(setup_script):
    with pytest.raises(SystemExit, match="FASTGAN_CUDA must be 0, 1 or unset, got 'yes'"):
        setup_script.decide_cuda("yes", *CUDA_TORCH, *TOOLKIT, ("8.0",))


@pytest.mark.sources
@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_setup_stops_before_compiling_when_cuda_is_asked_of_a_cpu_torch(tmp_path):
    run = run_setup(tmp_path, "build_ext", FASTGAN_CUDA="1")
    assert run.returncode != 0
    assert "FASTGAN_CUDA=1, but PyTorch" in run.stderr and "pip install --force-reinstall torch==" in run.stderr
    assert "Traceback" not in run.stderr


def test_cuda_toolkit_is_found_behind_a_wrapper_of_nvcc(setup_script, tmp_path, monkeypatch):
    toolkit, wrapper = tmp_path / "toolkit", tmp_path / "bin" / "nvcc"
    toolkit.mkdir()
    wrapper.parent.mkdir()
    wrapper.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Cuda compilation tools, release 13.0, V13.0.88";; *) echo "#\\$ TOP={toolkit}" >&2;; esac\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert setup_script.find_cuda_toolkit() == (toolkit.resolve(), "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert setup_script.find_cuda_toolkit() == (None, None)


def test_cuda_sources_are_compiled_with_cuda_only(setup_script, tmp_path, monkeypatch):
    for name in ("ops/conv.cpp", "ops/cuda_conv.cpp", "cuda/conv.cu", "cpu/conv_kernel.cpp"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).touch()
    monkeypatch.setattr(setup_script, "ROOT", tmp_path)
    always = ["csrc/library.cpp", "csrc/recording.cpp", "csrc/ops/conv.cpp"]
    assert setup_script.sources(cuda=False) == always
    assert setup_script.sources(cuda=True) == [*always, "csrc/ops/cuda_conv.cpp", "csrc/cuda/conv.cu"]


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("jobs, units", [(1, 2), (3, 3), (64, 4)])
def test_every_source_is_compiled_once(setup_script, cuda, tmp_path, monkeypatch, jobs, units):
    monkeypatch.setenv("MAX_JOBS", str(jobs))
    sources = setup_script.sources(cuda)
    compiled = setup_script.write_units(sources, tmp_path)
    assert sum(unit.endswith(".cpp") for unit in compiled) == units + cuda
    included = [path for unit in compiled if unit.endswith(".cpp") for path in re.findall('"(.+)"', Path(unit).read_text())]
    kernels = [str(ROOT / source) for source in compiled if not source.endswith(".cpp")]
    assert sorted(included + kernels) == sorted(str(ROOT / source) for source in sources)
    times = [Path(unit).stat().st_mtime_ns for unit in compiled if unit.endswith(".cpp")]
    assert setup_script.write_units(sources, tmp_path) == compiled
    assert [Path(unit).stat().st_mtime_ns for unit in compiled if unit.endswith(".cpp")] == times


@pytest.mark.parametrize("first", ["// Loops.", "// Instruction sets:", "// Instruction sets: avx2 avx3"])
def test_a_kernel_must_name_its_instruction_sets(setup_script, tmp_path, monkeypatch, first):
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/cpu/x_kernel.cpp").write_text(f"{first}\n#include <x.h>\n")
    monkeypatch.setattr(setup_script, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="the first line of csrc/cpu/x_kernel.cpp must be `// Instruction sets: ` and some of"):
        setup_script.kernel_jobs(tmp_path)


@pytest.mark.parametrize("says, openmp", [("Debian clang version 14.0.6", False), ("g++ (Debian 12.2.0-14) 12.2.0", True)])
def test_clang_is_not_given_an_openmp_of_its_own(setup_script, tmp_path, monkeypatch, says, openmp):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho '{says}'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert ("-fopenmp" in setup_script.extension(False).extra_compile_args["cxx"]) == openmp


@pytest.mark.parametrize("cores, jobs, threads", [(2, None, 1), (16, None, 4), (16, "8", 2), (16, "1", 1)])
def test_cores_that_the_cuda_sources_leave_compile_architectures(setup_script, monkeypatch, cores, jobs, threads):
    monkeypatch.setattr("torch.utils.cpp_extension.CUDAExtension", lambda name, sources, extra_compile_args: extra_compile_args)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", setup_script.CUDA_ARCHITECTURES)
    monkeypatch.delenv("MAX_JOBS", raising=False)
    if jobs is not None:
        monkeypatch.setenv("MAX_JOBS", jobs)
    assert len(list((ROOT / "csrc/cuda").glob("*.cu"))) == 4
    assert f"--threads={threads}" in setup_script.extension(True)["nvcc"]


# ---- which PyTorch -----------------------------------------------------------------------------------------------


def stub_torch(folder, version="9.9.0"):
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    (folder / "torch" / "version.py").write_text("cuda = None\n")


def test_build_isolation_finds_the_torch_of_the_environment(setup_script, tmp_path, monkeypatch):
    monkeypatch.setattr(setup_script.importlib.util, "find_spec", lambda name: None)  # what isolation looks like
    monkeypatch.setattr(setup_script.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(setup_script.site, "getsitepackages", lambda: [])
    monkeypatch.setattr(setup_script.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert not setup_script.make_environment_torch_visible()
    stub_torch(tmp_path)
    assert setup_script.make_environment_torch_visible()
    assert sys.path[-1] == str(tmp_path)


def test_python_m_build_finds_the_torch_of_the_activated_environment(setup_script, tmp_path, monkeypatch):
    activated = tmp_path / "activated"
    library = Path(setup_script.sysconfig.get_path("platlib", vars={"base": activated, "platbase": activated}))
    stub_torch(library)
    monkeypatch.setattr(setup_script.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(setup_script.site, "getsitepackages", lambda: [])
    monkeypatch.setattr(setup_script.site, "getusersitepackages", lambda: str(tmp_path / "user"))
    get_path = setup_script.sysconfig.get_path
    monkeypatch.setattr(setup_script.sysconfig, "get_path", lambda *a, **k: get_path(*a, **k) if k else str(tmp_path / "new"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("VIRTUAL_ENV", str(activated))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "other"))  # another environment's pip: not its business
    assert not setup_script.make_environment_torch_visible()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "build-env-x1"))
    assert setup_script.make_environment_torch_visible()
    assert sys.path[-1] == str(library)


def test_without_torch_the_build_requires_the_tested_version(setup_script, monkeypatch):
    asked = {}
    monkeypatch.setattr(setup_script, "setup", lambda **arguments: asked.update(arguments))
    setup_script.setup_without_torch(["egg_info"])
    assert asked["setup_requires"] == [f"torch=={setup_script.TESTED_TORCH}"]
    with pytest.raises(SystemExit, match=f"pip install torch=={setup_script.TESTED_TORCH}"):
        setup_script.setup_without_torch(["bdist_wheel"])


def test_sources_are_packed_without_torch(setup_script, monkeypatch):
    asked = {}
    monkeypatch.setattr(setup_script, "setup", lambda **arguments: asked.update(arguments))
    setup_script.setup_without_torch(["sdist", "--formats", "gztar"])
    assert "setup_requires" not in asked and asked["version"] == setup_script.VERSION


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cu117"])
def test_older_torch_is_refused(setup_script, version):
    with pytest.raises(SystemExit, match=re.escape(f"needs PyTorch 2.10 or newer, found {version}")):
        setup_script.check_torch(version)
    setup_script.check_torch("2.10.0")


def import_fastgan(cwd, path=""):
    """Imports fastgan in a process of its own, which looks for it in the folders cwd and path, in that order."""
    code = "import fastgan; print(fastgan.build_info()['cpu_kernels'], fastgan.__file__, fastgan.ops.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.fixture
def unbuilt_source(tmp_path):
    """The package as a fresh clone has it: without an extension."""
    source = tmp_path / "clone" / "fastgan"
    leave = shutil.ignore_patterns("__pycache__", "*.so", "_build_config.py", "digits")
    shutil.copytree(Path(fastgan.ops.__file__).parents[1], source, ignore=leave)
    return source


def test_another_torch_than_built_against_is_one_clear_import_error(unbuilt_source):
    (unbuilt_source / "_build_config.py").write_text("VERSION = '0.1.0'\nTORCH_VERSION = '2.10.7+cpu'\n")
    run = import_fastgan(unbuilt_source.parent)
    assert run.returncode != 0
    assert "ImportError: fastgan 0.1.0 was built against PyTorch 2.10.7+cpu, but PyTorch" in run.stderr
    assert "pip install --force-reinstall" in run.stderr


@pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="no compiled extension")
def test_unbuilt_source_folder_does_not_hide_the_installed_package(unbuilt_source):
    installed = Path(fastgan.ops.__file__).parents[1]
    run = import_fastgan(unbuilt_source.parent, installed.parent)
    assert run.stdout.split() == ["True", *(str(installed / file) for file in ("__init__.py", "ops/__init__.py"))], run.stderr


def test_missing_compiler_is_named_before_anything_is_compiled(setup_script, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(SystemExit, match="no C.. compiler: CXX is 'no-such-compiler -m64', which is not on PATH"):
        setup_script.find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="no C.. compiler: c.. is not on PATH; install one .*apt install g.."):
        setup_script.find_compiler()
    (tmp_path / "c++").touch(0o755)
    assert setup_script.find_compiler() == ["c++"]


# ---- what an installation says about itself ----------------------------------------------------------------------


def test_build_info_names_versions_instruction_sets_and_why_there_is_no_cuda():
    info = fastgan.build_info()
    assert set(info) == {
        "version", "torch_version", "torch_running", "cpu_kernels", "cpu_reason", "cpu_isas_compiled",
        "cpu_isas_available", "cpu_isa", "cuda_version", "cuda_architectures", "cuda_kernels", "cuda_reason",
        "cuda_devices_run",
    }  # fmt: skip
    assert info["torch_running"] == torch.__version__
    assert info["cuda_reason"]
    if info["cpu_kernels"]:
        assert info["cpu_reason"] is None
        assert info["cpu_isa"] in info["cpu_isas_available"]
        assert set(info["cpu_isas_available"]) <= set(info["cpu_isas_compiled"])
    else:
        assert info["cpu_reason"]


def test_python_m_fastgan_prints_build_info(tmp_path):
    package = Path(fastgan.ops.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-m", "fastgan"], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    printed = {line.split()[0] for line in run.stdout.splitlines()}
    assert printed == set(fastgan.build_info())


# ---- the source distribution ---------------------------------------------------------------------------------------


@pytest.mark.sources
def test_source_distribution_holds_every_file_that_build_and_tests_need(tmp_path):
    leave = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.py[cod]", "*.so", "_build_config.py"
    )
    tree = tmp_path / "fastgan"
    shutil.copytree(ROOT, tree, ignore=leave)
    if (ROOT / ".git").exists():
        listing = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout
        expected = {name for name in listing.splitlines() if (ROOT / name).exists()}
    else:
        expected = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    # Without PyTorch, as it may be made.
    code = "import sys, setup; sys.argv[0] = 'setup.py'; setup.setup_without_torch(sys.argv[1:])"
    run = subprocess.run(
        [sys.executable, "-c", code, "sdist", "--dist-dir", tmp_path], cwd=tree, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (archive,) = tmp_path.glob("fastgan-*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    assert len(expected) > 100
    assert {name for name in expected - held if not name.startswith(".")} == set()


# ---- CMake -------------------------------------------------------------------------------------------------------


@pytest.mark.sources
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake on PATH")
def test_cmake_compiles_as_setup_py_does_and_native_tests_pass(setup_script):
    build = ROOT / "build" / "native"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", ROOT, "-B", build, *generator],
        ["cmake", "--build", build, "--parallel", str(setup_script.compilers_at_once())],
        ["ctest", "--test-dir", build, "--output-on-failure"],
    ):
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CXXFLAGS": ""})
        assert run.returncode == 0, run.stdout + run.stderr
    cmake = []
    for command in json.loads((build / "compile_commands.json").read_text()):
        if "/csrc/" in command["file"]:
            flags = [word for word in shlex.split(command["command"])[1:] if word.startswith("-") and not word.startswith("-I")]
            cmake.append((command["file"], sorted(flag for flag in flags if flag not in ("-o", "-c", "-DNDEBUG"))))
    assert sorted(cmake) == sorted((str(source), sorted(flags)) for source, _, flags in setup_script.kernel_jobs(build))
