"""Compiles every CUDA source for every target with warnings as errors and tabulates what the compiler reports.

    python benchmarks/cuda_compile_report.py [--output benchmarks/results/cuda_compile.md] [--json FILE]

Needs nvcc, no GPU and no PyTorch. Registers are per thread; spills and stack are bytes of local memory per thread.
Shared memory is bytes per block: the compiler's own (static), and for the main loops what a launch asks for (dynamic).
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEMS = sorted((path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")), key=lambda stem: stem != "conv4x4s2")  # the longest first
# What is compiled in one go. The sources differ from 9.0 on (__CUDA_ARCH__), so that the others are assembled from one PTX: two
# thirds of a compilation go into making that.
GROUPS = (("80", "86", "89"), ("90a",))
ARCHITECTURES = tuple(architecture for group in GROUPS for architecture in group)
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes spill stores, "
    r"(?P<spill_loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers[^\n]*?(?:, (?P<static_shared>\d+) bytes smem|\n|$)",
    re.DOTALL,
)


def nvcc_version() -> str:
    return (
        subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True)
        .stdout.split("release ")[1]
        .split()[1]
    )


def demangle(names: list[str]) -> list[str]:
    text = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True).stdout
    short = []
    for line in text.splitlines():
        line = line.replace("fastgan::cuda::", "").replace("(anonymous namespace)::", "").removeprefix("void ")
        line = re.sub(r"\((\w+::)+\w+\)(?=\d)", "", line)  # the type of an enumerator among template arguments
        short.append(line.split("(")[0].replace("> >", ">>"))
    return short


def main_loop_shared_bytes() -> dict[str, int]:
    """Dynamic shared memory per block of the main loops, by the start of the kernel's name."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/cuda_shared_memory"
        compiler = os.environ.get("CXX", "g++").split()
        sources = [ROOT / "benchmarks/cuda_shared_memory.cpp", ROOT / "csrc/cuda/host/fibers.cpp"]
        flags = ["-std=c++17", "-DFASTGAN_CUDA_HOST", "-Wno-unknown-pragmas"]
        subprocess.run([*compiler, *flags, *sources, "-o", program], check=True)
        output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    lines = (line.split("\t") for line in output.replace("fastgan::cuda::", "").splitlines())
    return {start: int(count) for start, count in lines}


def compile_source(stem: str, architectures: tuple[str, ...], dynamic_shared: dict[str, int]) -> list[dict]:
    """One row a kernel and architecture; raises on any warning.

    Returns:
        Rows with stem, kernel, architecture, registers, stack, spill_stores, spill_loads, static_shared and
        dynamic_shared, which is None where a launch decides by the size of its data or by its number of threads.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [
                "nvcc",
                "-std=c++17",
                "-O3",
                "-c" if architectures == GROUPS[0] else "-fatbin",  # what runs on the host is the same for all
                "-DFASTGAN_HOPPER",  # as setup.py, for targets with 9.0a among them
                f"-gencode=arch=compute_{architectures[0]},code=[{','.join(f'sm_{a}' for a in architectures)}]",
                "-Werror",
                "all-warnings",
                "-Xptxas",
                "-v",
                "-Xcompiler",
                "-Wall,-Wextra,-Werror",
                "-o",
                f"{folder}/{stem}.o",
                ROOT / f"csrc/cuda/{stem}.cu",
            ],
            capture_output=True,
            text=True,
        )
    if result.returncode != 0:
        raise RuntimeError(f"nvcc failed on {stem}.cu:\n{result.stdout}{result.stderr}")
    entries = [m.groupdict() for m in ENTRY.finditer(result.stdout + result.stderr)]
    rows = []
    for entry, kernel in zip(entries, demangle([e["name"] for e in entries]), strict=True):
        keys = ("registers", "stack", "spill_stores", "spill_loads", "static_shared")
        numbers = {key: int(entry[key] or 0) for key in keys}
        numbers["dynamic_shared"] = next(
            (count for start, count in dynamic_shared.items() if kernel.startswith(start)), None
        )
        rows.append({"stem": stem, "kernel": kernel, "architecture": f"sm_{entry['architecture']}", **numbers})
    return rows


def write_table(rows: list[dict], path: Path, seconds: float) -> None:
    columns = [f"sm_{a}" for a in ARCHITECTURES]
    lines = [
        "# CUDA kernels as the compiler sees them",
        "",
        f"nvcc {nvcc_version()}, {time.strftime('%Y-%m-%d')}, warnings as errors, all sources for {', '.join(columns)} "
        f"in {seconds:.0f} s of processor time.",
        "Written by `python benchmarks/cuda_compile_report.py --output benchmarks/results/cuda_compile.md`.",
        "Registers per thread, `+n` bytes of spills where there are any. Shared memory is static + dynamic bytes per",
        "block; `n` stands for a dynamic part of at most 32 KiB that a launch derives from its number of threads or of",
        "classes.",
        "",
        f"| kernel | {' | '.join(columns)} | shared memory |",
        f"|---|{'---|' * len(columns)}---|",
    ]
    for kernel in sorted({row["kernel"] for row in rows}):
        cells = []
        for column in columns:
            row = next(r for r in rows if r["kernel"] == kernel and r["architecture"] == column)
            spills = row["spill_stores"] + row["spill_loads"]
            cells.append(f"{row['registers']}" + (f" +{spills}" if spills else ""))
        static = max(r["static_shared"] for r in rows if r["kernel"] == kernel)
        dynamic = "n" if row["dynamic_shared"] is None else row["dynamic_shared"]
        lines.append(f"| `{kernel}` | {' | '.join(cells)} | {static} + {dynamic} |")
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the table here (Markdown)")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    if shutil.which("nvcc") is None:
        raise SystemExit("cuda_compile_report: nvcc is not on PATH")
    dynamic_shared = main_loop_shared_bytes()
    jobs = [(stem, group) for stem in STEMS for group in GROUPS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda job: compile_source(*job, dynamic_shared), jobs)
        rows = [row for part in compiled for row in part]
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    if arguments.output:
        write_table(rows, arguments.output, usage.ru_utime + usage.ru_stime)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    spilled = [f"{r['kernel']} ({r['architecture']})" for r in rows if r["spill_stores"] + r["spill_loads"]]
    print(
        f"{len(rows)} kernels, {len(spilled)} with spills{': ' + ', '.join(spilled) if spilled else ''}, "
        f"most registers {max(r['registers'] for r in rows)}, "
        f"most shared memory {max(r['static_shared'] + (r['dynamic_shared'] or 0) for r in rows)} bytes per block"
    )


if __name__ == "__main__":
    main()
