"""The whole benchmark suite of the CPU, per operator and per step, into benchmarks/results/.

    python benchmarks/suite.py                      all of it, on idle cores
    python benchmarks/suite.py --parts ops memory   parts of it

Every part is a command of its own and checks results before it times them; see there for its options:
    ops       pytest bench_ops.py: every operator on the layers of a DCGAN
    step      bench_step.py: the training step, and sampling, against all peers
    memory    peak_memory.py: peak memory of a step
    profile   profile_step.py: where the time of a step goes, with a picture
    scaling   scaling.py: how cost grows with batch, image size and width, with a picture
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def ops_table(path):
    """Markdown from pytest-benchmark's JSON: one row an operator, layer, dtype, direction and peer."""
    document = json.loads(path.read_text())
    lines = [
        f"# Operators, layer by layer\n\n{document['machine_info']['cpu']['brand_raw']}, {document['datetime'][:10]}\n",
        "| layer | peer | median, ms | GFLOP/s | of the peak | MB | GB/s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for entry in sorted(document["benchmarks"], key=lambda entry: (entry["group"], entry["params"]["peer"])):
        info = entry["extra_info"]
        roofline = "| – | – | – | – |"  # not a convolution
        if info:
            roofline = (
                f"| {info['GFLOP/s']:.0f} | {info['share of peak']:.0%} | {info['bytes'] / 1e6:.1f} | {info['GB/s']:.1f} |"
            )
        lines.append(f"| {entry['group']} | {entry['params']['peer']} | {entry['stats']['median'] * 1e3:.2f} {roofline}")
    return "\n".join(lines) + "\n"


def without_samples(path):
    """Drops the time of every single call, and the host's name, from pytest-benchmark's JSON: a tenth of it is left."""
    document = json.loads(path.read_text())
    document["machine_info"].pop("node", None)
    for entry in document["benchmarks"]:
        entry["stats"].pop("data", None)
    path.write_text(json.dumps(document, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("ops", "step", "memory", "profile", "scaling")
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    result = {part: arguments.output / f"{part}_{date}" for part in parts}
    ops_json = result["ops"].with_suffix(".json")
    commands = {
        "ops": [sys.executable, "-m", "pytest", HERE / "bench_ops.py", "--benchmark-enable", "--benchmark-disable-gc",
                "--benchmark-max-time=0.5", "--benchmark-min-rounds=3", f"--benchmark-json={ops_json}"],
        "step": [sys.executable, HERE / "bench_step.py", "--output", result["step"]],
        "memory": [sys.executable, HERE / "peak_memory.py", "--output", result["memory"].with_suffix(".json")],
        "profile": [sys.executable, HERE / "profile_step.py", "--output", result["profile"]],
        "scaling": [sys.executable, HERE / "scaling.py", "--output", result["scaling"]],
    }  # fmt: skip
    for part in arguments.parts:
        subprocess.run(commands[part], check=True)
        if part == "ops":
            without_samples(ops_json)
            result["ops"].with_suffix(".md").write_text(ops_table(ops_json))


if __name__ == "__main__":
    main()
