"""The bar for the three main loops: cuDNN's convolutions of the 64-px DCGAN, and fastgan's own, each direction alone.

    python benchmarks/gpu/cudnn.py --output cudnn.json [--device cuda] [--batch 128 1024] [--seconds 40] [--cudnn-only]

Channels_last; bfloat16, and float32 by TF32 for the stride-2 layers at the first batch size. cuDNN chooses its
algorithm by measurement. Calls are timed inside CUDA graphs, so that the host's launches stay out of the figures; one
call repeated finds its operands in the L2 cache where they fit. fastgan's calls are its operators with activation
"identity": each packs the weight first, and each gradient starts with a pass over the output's gradient, which the
column "act pass" gives alone.
"""

import argparse
import time
from pathlib import Path

import torch
from layers import LAYERS, flops, stride_and_padding
from timing import Results, captured, check, compare, relative_error, seconds_per_call

DIRECTIONS = ("forward", "input gradient", "weight gradient")
DTYPES = {"bf16": (torch.bfloat16, 2e-2), "tf32": (torch.float32, 5e-3)}  # and how far two results may be apart


def candidates_of(layer, batch, device, dtype):
    """Name of the direction to a call, of cuDNN and of fastgan; fastgan's "act pass" too."""
    transposed, in_channels, out_channels, size = layer
    stride, padding = stride_and_padding(layer)
    shape = (in_channels, out_channels, 4, 4) if transposed else (out_channels, in_channels, 4, 4)

    def random(*sizes):
        return torch.randn(*sizes, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    x, w = random(batch, in_channels, size, size), random(*shape) * 0.02
    where = ([stride] * 2, [padding] * 2, [1, 1], transposed, [0, 0], 1)
    identity = ("identity", 0.0)
    y = torch.ops.aten.convolution(x, w, None, *where)
    dy = torch.randn_like(y)

    def cudnn_backward(i):
        mask = [i == 0, i == 1, False]
        return torch.ops.aten.convolution_backward(dy, x, w, None, *where, mask)[i]

    def fastgan_backward(*mask):
        return torch.ops.fastgan.conv_act_backward(dy, x, w, y, *where, *identity, [*mask, False])

    cudnn = (
        lambda: torch.ops.aten.convolution(x, w, None, *where),
        lambda: cudnn_backward(0),
        lambda: cudnn_backward(1),
    )
    ours = (
        lambda: torch.ops.fastgan.conv_act_forward(x, w, None, *where, *identity),
        lambda: fastgan_backward(True, False)[0],
        lambda: fastgan_backward(False, True)[1],
    )
    return dict(zip(DIRECTIONS, cudnn)), dict(zip(DIRECTIONS, ours)), lambda: fastgan_backward(False, False)


def registered():
    """True if fastgan's operators are there."""
    try:
        import fastgan  # noqa: F401
    except ImportError as error:
        print(f"cuDNN alone: {error}")
        return False
    return True


def measure(layer, batch, device, dtype_name, with_fastgan, results):
    transposed, in_channels, out_channels, size = layer
    name = f"{'T' if transposed else 'C'} {in_channels}->{out_channels} @{size}"
    dtype, bound = DTYPES[dtype_name]
    cudnn, ours, act_pass = candidates_of(layer, batch, device, dtype)
    ready, errors = {}, {}
    for direction in DIRECTIONS:
        with results.surviving(f"cuDNN {name} batch {batch} {dtype_name} {direction}"):
            cudnn[direction]()  # chooses the algorithm
            ready["cudnn", direction] = cudnn[direction]
        if not with_fastgan:
            continue
        with results.surviving(f"fastgan {name} batch {batch} {dtype_name} {direction}"):
            errors[direction] = check(relative_error(ours[direction](), cudnn[direction]()), bound)
            ready["fastgan", direction] = ours[direction]
    if with_fastgan:
        with results.surviving(f"fastgan {name} batch {batch} {dtype_name} act pass"):
            act_pass()
            ready["fastgan", "act pass"] = act_pass
    slowest = max(seconds_per_call(call, device, 2) for call in ready.values())
    calls = 1 if device.type == "cpu" else min(20, max(4, int(1e-3 / slowest)))
    graphs = {}
    for key, call in ready.items():
        with results.surviving(f"{' '.join(key)} {name} batch {batch} {dtype_name}, captured"):
            graphs[key] = captured(call, device, calls)
    times = compare(graphs, device, rounds=7, target_seconds=0.004, inside=calls)
    work = flops(layer, batch)
    for direction in DIRECTIONS:
        text, row = "", {"layer": name, "batch": batch, "dtype": dtype_name, "direction": direction, "flops": work}
        for peer in ("cudnn", "fastgan"):
            if (peer, direction) in times:
                seconds = times[peer, direction]["median_s"]
                row[peer] = times[peer, direction]
                text += f"{seconds * 1e6:9.1f} {work / seconds / 1e12:8.1f}"
            else:
                text += f"{'-':>9s} {'-':>8s}"
        if "cudnn" in row and "fastgan" in row:
            row["error"] = errors[direction]
            text += f"{row['cudnn']['median_s'] / row['fastgan']['median_s']:7.2f}"
        if direction != "forward" and ("fastgan", "act pass") in times:
            row["act_pass"] = times["fastgan", "act pass"]
            text += f"{row['act_pass']['median_s'] * 1e6:10.1f}"
        print(f"{name:16s} {batch:5d} {dtype_name:5s} {direction:15s} {text}", flush=True)
        results.add(row)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=40, help="leave out the layers that do not fit into this")
    parser.add_argument("--cudnn-only", action="store_true", help="leave fastgan out")
    arguments = parser.parse_args()
    with_fastgan = not arguments.cudnn_only and registered()
    begin, device = time.monotonic(), torch.device(arguments.device)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    cases = [(layer, batch, "bf16") for batch in arguments.batch for layer in LAYERS if "bf16" in arguments.dtypes]
    stride_2 = [layer for layer in LAYERS if stride_and_padding(layer)[0] == 2]
    cases += [(layer, arguments.batch[0], "tf32") for layer in stride_2 if "tf32" in arguments.dtypes]
    results = Results(arguments.output)
    print(
        f"{'layer':16s} batch dtype {'direction':15s}  cuDNN us  TFLOP/s  ours us  TFLOP/s  ratio  act pass us\n"
        "(C: Conv2d, T: ConvTranspose2d; ratio over 1: ours is faster; ours holds the weight's packing and, in "
        "gradients, the act pass)",
        flush=True,
    )
    for done, (layer, batch, dtype_name) in enumerate(cases):
        if time.monotonic() - begin > arguments.seconds:
            print(f"{len(cases) - done} of {len(cases)} left out: {arguments.seconds:.0f} s are gone", flush=True)
            break
        with results.surviving(f"{layer} batch {batch} {dtype_name}"):
            measure(layer, batch, device, dtype_name, with_fastgan, results)
    print(f"{time.monotonic() - begin:.0f} s")
    results.exit()


if __name__ == "__main__":
    main()
