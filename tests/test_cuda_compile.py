"""The CUDA sources compile for every target without a warning, the compiler spills no register, and a block fits into
a multiprocessor's registers and shared memory."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks/cuda_compile_report.py"
MAX_SHARED_BYTES = 99 * 1024  # of one block on sm_86 and sm_89; the other targets give more
THREADS = {
    "gather_kernel": {"128, 128": 256, "64, 64": 128},
    "weight_gradient_kernel": {"128, 128": 256, "64, 64": 128},
}

pytestmark = [pytest.mark.sources, pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")]


@pytest.fixture(scope="module")
def report(request, tmp_path_factory) -> list[dict]:
    """What the compiler reports; compiled again only when a source or the compiler has changed."""
    sources = sorted(path for path in (ROOT / "csrc/cuda").iterdir() if path.is_file())
    version = subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout
    sources += [SCRIPT, ROOT / "benchmarks/cuda_shared_memory.cpp", ROOT / "csrc/activation.h"]
    content = version + b"".join(path.read_bytes() for path in sources)
    key = "fastgan/cuda_compile/" + hashlib.sha256(content).hexdigest()
    cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    rows = cache.get(key, None) if cache else None
    if rows is None:
        output = tmp_path_factory.mktemp("compile") / "report.json"
        run = subprocess.run([sys.executable, SCRIPT, "--json", output], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        rows = json.loads(output.read_text())
        if cache:
            cache.set(key, rows)
    return rows


def test_every_kernel_compiles_for_every_target(report):
    architectures = {"sm_80", "sm_86", "sm_89", "sm_90a"}
    for kernel in {row["kernel"] for row in report}:
        assert {row["architecture"] for row in report if row["kernel"] == kernel} == architectures, kernel


def test_no_kernel_spills_registers(report):
    spilled = [
        (r["kernel"], r["architecture"], r["spill_stores"]) for r in report if r["spill_stores"] + r["spill_loads"]
    ]
    assert spilled == []


def test_main_loops_leave_room_for_a_block_on_every_multiprocessor(report):
    main_loops = [row for row in report if row["kernel"].split("<")[0] in THREADS]
    assert len(main_loops) == 4 * (2 * 2 * 2 + 2 * 2)  # targets * (F and T: direct or not; W), two types, two tiles
    for row in main_loops:
        tiles = THREADS[row["kernel"].split("<")[0]]
        threads = next(count for tile, count in tiles.items() if f"Tile<{tile}" in row["kernel"])
        assert row["registers"] * threads <= 65536, row


def test_main_loops_shared_memory_fits_every_target(report):
    main_loops = [row for row in report if row["kernel"].split("<")[0] in THREADS]
    for row in main_loops:
        assert 0 < row["dynamic_shared"], row
        assert row["static_shared"] + row["dynamic_shared"] <= MAX_SHARED_BYTES, row


def test_thin_image_loops_leave_room_for_a_block_on_every_multiprocessor(report):
    thin = [row for row in report if row["kernel"].startswith("thin_")]
    assert len(thin) == 4 * 2 * 4 * (3 + 1 + 1)  # targets * types * channels * (down: three epilogues; up; W)
    for row in thin:
        assert row["registers"] * 256 <= 65536, row
        assert 0 < row["dynamic_shared"], row
        assert row["static_shared"] + row["dynamic_shared"] <= MAX_SHARED_BYTES, row


def test_dense_loops_leave_registers_for_two_blocks_on_every_multiprocessor(report):
    dense = [row for row in report if row["kernel"].startswith("dense_")]
    assert len(dense) == 4 * 2 * (2 + 1)  # targets * types * (up: two tiles; W)
    for row in dense:
        threads = 128 if "Tile<64" in row["kernel"] else 256
        assert row["registers"] * threads * 2 <= 65536, row
        assert 0 < row["dynamic_shared"] and row["static_shared"] == 0, row
        assert row["dynamic_shared"] <= MAX_SHARED_BYTES, row


def test_hopper_loops_have_the_registers_that_their_blocks_need(report):
    loops = [row for row in report if "box_kernel" in row["kernel"] and row["architecture"] == "sm_90a"]
    # Types * (clusters * (columns * stages, and 256 columns); W), and TF32's of 128 columns.
    assert len(loops) == 2 * (2 * (2 * 2 + 1) + 1) + 2 * 2
    for row in loops:
        gather = re.search(r"gather_box_kernel<\w+, \d+, \d+, (\d), \d>", row["kernel"])  # columns, stages, blocks, cluster
        blocks = int(gather[1]) if gather else 1
        assert row["registers"] > 64 and row["registers"] * 256 * blocks <= 65536, row  # and it is no empty body


def test_other_kernels_leave_shared_memory_to_the_launch(report):
    # What a launch gets without asking for more is 48 KiB less the static part.
    assert {row["static_shared"] for row in report if row["dynamic_shared"] is None} == {0}


def test_report_in_the_repository_lists_these_kernels(report):
    table = (ROOT / "benchmarks/results/cuda_compile.md").read_text()
    missing = [row["kernel"] for row in report if f"`{row['kernel']}`" not in table]
    assert not missing, f"run python {SCRIPT.relative_to(ROOT)} --output benchmarks/results/cuda_compile.md"
