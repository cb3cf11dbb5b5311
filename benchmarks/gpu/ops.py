"""Every layer of the 64-px DCGAN and the CatGAN loss: fused against PyTorch, forward and backward, each its own time.

    python benchmarks/gpu/ops.py --output ops.json [--device cuda] [--batch 128 1024] [--rows 1000000]

Layers run in channels_last bfloat16; cuDNN may choose its algorithm by measurement. The loss runs eagerly and in CUDA
graphs, without the host's time. Each result is checked against the peer before it is timed.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from layers import LAYERS, flops, stride_and_padding
from timing import Results, captured, check, compare, relative_error, seconds_per_call

import fastgan


def layer_case(layer, batch, device, dtype):
    """The fused call, PyTorch's, and the tensors whose gradients are wanted."""
    transposed, in_channels, out_channels, size = layer
    stride, padding = stride_and_padding(layer)
    shape = (in_channels, out_channels, 4, 4) if transposed else (out_channels, in_channels, 4, 4)
    make = {"device": device, "dtype": dtype}
    x = torch.randn(batch, in_channels, size, size, **make).contiguous(memory_format=torch.channels_last)
    w = (torch.randn(*shape, **make) * 0.02).contiguous(memory_format=torch.channels_last)
    gamma, beta = torch.rand(out_channels, device=device) + 0.5, torch.randn(out_channels, device=device)
    tensors = [t.requires_grad_() for t in (x, w, gamma, beta)]
    normalised = out_channels not in (1, 3) and in_channels != 3
    activation = "relu" if transposed else "leaky_relu"
    if not normalised:
        activation = {3: "tanh", 1: "identity"}.get(out_channels, "leaky_relu")
        tensors = tensors[:2]
    where = {"stride": stride, "padding": padding}
    name = "conv_transpose2d" if transposed else "conv2d"

    def fused(x, w, *bn):
        if bn:
            return getattr(fastgan.ops, f"{name}_bn_act")(x, w, None, *bn, activation=activation, **where)
        return getattr(fastgan.ops, f"{name}_act")(x, w, activation=activation, **where)

    def plain(x, w, *bn):
        y = getattr(F, name)(x, w, **where)
        if bn:
            y = F.batch_norm(y, None, None, *bn, training=True)
        return {
            "relu": F.relu,
            "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
            "tanh": torch.tanh,
            "identity": lambda z: z,
        }[activation](y)

    return fused, plain, tensors, f"{name} {in_channels}->{out_channels} {size}px"


def forward_and_backward(function, tensors):
    """Two calls: forward alone; backward alone, from one kept graph."""
    output = function(*tensors)
    grad = torch.randn_like(output)

    def forward():
        with torch.no_grad():
            function(*tensors)

    return forward, lambda: torch.autograd.grad(output, tensors, grad, retain_graph=True)


def measure_layer(layer, batch, device, results):
    fused, plain, tensors, name = layer_case(layer, batch, device, torch.bfloat16)
    error = check(relative_error(fused(*tensors), plain(*tensors)), 0.03)
    calls = {}
    for peer, function in (("fastgan", fused), ("pytorch", plain)):
        calls[f"{peer} forward"], calls[f"{peer} backward"] = forward_and_backward(function, tensors)
    times = compare(calls, device)
    row = {"layer": name, "batch": batch, "error": error, "forward_flops": flops(layer, batch), "times": times}
    results.add(row)
    ratio = {
        way: times[f"pytorch {way}"]["median_s"] / times[f"fastgan {way}"]["median_s"]
        for way in ("forward", "backward")
    }
    print(
        f"{name:32s} batch {batch:5d}  forward {times['fastgan forward']['median_s'] * 1e6:8.1f} us "
        f"x{ratio['forward']:.2f}   backward {times['fastgan backward']['median_s'] * 1e6:8.1f} us "
        f"x{ratio['backward']:.2f}",
        flush=True,
    )


def copy_bandwidth(device, size):
    """Bytes a second, read and written, of a copy that no cache holds."""
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / compare({"copy": lambda: target.copy_(source)}, device)["copy"]["median_s"]


def plain_entropies(logits):
    log_p = F.log_softmax(logits, 1)
    p = log_p.exp()
    q = p.mean(0)
    return -(p * log_p).sum(1).mean(), -torch.xlogy(q, q).sum()


def measure_entropies(rows, classes, device, bandwidth, results, graph=False):
    """CatGAN's loss, forward and backward together, and the share of the copy bandwidth that its bytes reach."""
    logits = torch.randn(rows, classes, device=device, requires_grad=True)

    def loss_and_gradient(function):
        conditional, marginal = function(logits)
        return conditional, marginal, *torch.autograd.grad(conditional - marginal, logits)

    candidates = {
        "fastgan": lambda: loss_and_gradient(fastgan.ops.softmax_entropy),
        "pytorch": lambda: loss_and_gradient(plain_entropies),
    }
    error = check(max(relative_error(*pair) for pair in zip(*(call() for call in candidates.values()))), 1e-4)
    inside = 1
    if graph:
        seconds = max(seconds_per_call(call, device, 3) for call in candidates.values())
        inside = min(20, max(1, int(0.05 / seconds)))  # a graph stays below 50 ms, where one call does
        candidates = {name: captured(call, device, inside) for name, call in candidates.items()}
    times = compare(candidates, device, inside=inside)
    seconds = times["fastgan"]["median_s"]
    moved = 3 * logits.numel() * logits.element_size()  # logits read twice, gradient written
    name = f"softmax_entropy [{rows}, {classes}]" + (" in a graph" if graph else "")
    share = moved / seconds / bandwidth
    results.add(
        {"layer": name, "error": error, "bytes": moved, "share_of_copy": share, "copy": bandwidth, "times": times}
    )
    print(
        f"{name:40s} forward + backward {seconds * 1e6:8.1f} us  {moved / seconds / 1e12:.3f} TB/s = {share:.0%} of a "
        f"copy's {bandwidth / 1e12:.2f}  PyTorch {times['pytorch']['median_s'] * 1e6:.1f} us "
        f"x{times['pytorch']['median_s'] / seconds:.2f}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, nargs="*", default=[128, 1024], help="of the layers; none: the loss alone")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the largest entropy")
    parser.add_argument("--copy-bytes", type=int, default=1 << 31, help="size of the copy that gives the bandwidth")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    results = Results(arguments.output)
    bandwidth = copy_bandwidth(device, arguments.copy_bytes)
    for rows, classes in ((100, 10), (arguments.rows, 10), (arguments.rows, 1000)):
        for graph in (False, True):
            with results.surviving(f"softmax_entropy [{rows}, {classes}]" + (" in a graph" if graph else "")):
                measure_entropies(rows, classes, device, bandwidth, results, graph)
    for batch in arguments.batch:
        for layer in LAYERS:
            with results.surviving(f"{layer} batch {batch}"):
                measure_layer(layer, batch, device, results)
    results.exit()


if __name__ == "__main__":
    main()
