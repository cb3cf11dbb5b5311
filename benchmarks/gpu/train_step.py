"""A whole DCGAN training step (discriminator, generator, Adam): PyTorch's ways against fastgan, in one process.

    python benchmarks/gpu/train_step.py --output train_step.json [--device cuda] [--seconds 210]
    python benchmarks/gpu/train_step.py --profile "fastgan bf16" "channels_last bf16" [--cases 64x3x128]

Configurations (--configurations, all by default):
    eager float32           contiguous, PyTorch's defaults (cuDNN may use TF32)
    channels_last bf16      autocast, torch.optim.Adam fused and capturable; ... graph: captured in a CUDA graph
    fastgan bf16            networks fused by fastgan, fastgan.optim.Adam;   ... graph
    channels_last tf32, fastgan tf32, each also graph          only for --tf32-cases
    compile default bf16, the same in a graph, compile reduce-overhead bf16, compile max-autotune bf16
                            only for --compile-cases, after everything else, max-autotune last; in PyTorch's default
                            format unless --compile-format says otherwise: Inductor chooses formats itself, and given
                            channels_last, PyTorch 2.11's fails in the last layer's backward pass

A configuration that no longer fits --seconds is left out and said so. With --profile nothing is timed: the kernels of
one step are listed.

Memory is what a configuration adds to the process. Peak: most bytes allocated during a step (for a captured one, during
the capture), as a multiple of plain PyTorch's with the same numbers. Kept: what stays reserved between steps; scratch
memory of the graphs that torch.compile makes itself is in this figure alone.
"""

import argparse
import gc
import time
from pathlib import Path

import torch
from timing import Results, captured, compare

import fastgan
from fastgan import losses, models

GRAPH = " graph"
COMPILE_MODES = {f"compile {mode} bf16": mode for mode in ("default", "reduce-overhead", "max-autotune")}
EAGER = {"float32": "eager float32", "bf16": "channels_last bf16", "tf32": "channels_last tf32"}
BF16 = [EAGER["float32"], EAGER["bf16"], EAGER["bf16"] + GRAPH, "fastgan bf16", "fastgan bf16" + GRAPH]
TF32 = [EAGER["tf32"], EAGER["tf32"] + GRAPH, "fastgan tf32", "fastgan tf32" + GRAPH]
# Timed once more beside what is compiled.
REFERENCES = [EAGER["float32"], EAGER["bf16"], EAGER["bf16"] + GRAPH, "fastgan bf16" + GRAPH]
COMPILED = ["compile default bf16", "compile default bf16" + GRAPH, "compile reduce-overhead bf16"]
COMPILED_LAST = ["compile max-autotune bf16"]
# How long to prepare one takes at least, before any was prepared.
COMPILE_SECONDS = {"compile default bf16": 30, "compile reduce-overhead bf16": 30, "compile max-autotune bf16": 60}


class Step:
    """One training step on a fixed batch, with everything it needs."""

    def __init__(self, device, case, name, compile_format=torch.contiguous_format):
        torch.manual_seed(0)
        image_size, channels, batch = case
        self.device, self.mixed = device, "bf16" in name
        self.compile_mode = COMPILE_MODES.get(name)
        self.generator, self.discriminator = (n.to(device) for n in models.dcgan(image_size, channels))
        self.real = torch.rand(batch, channels, image_size, image_size, device=device) * 2 - 1
        tuned = name != EAGER["float32"]
        if tuned:
            memory_format = compile_format if self.compile_mode else torch.channels_last
            self.generator, self.discriminator = (
                n.to(memory_format=memory_format) for n in (self.generator, self.discriminator)
            )
            self.real = self.real.contiguous(memory_format=memory_format)
        optimizer = torch.optim.Adam
        if name.startswith("fastgan"):
            self.generator, self.discriminator = fastgan.fuse(self.generator), fastgan.fuse(self.discriminator)
            optimizer = fastgan.optim.Adam
        adam = {"lr": 2e-4, "betas": (0.5, 0.999)}
        if tuned and device.type == "cuda":  # plain eager keeps the optimizer's defaults
            adam |= {"fused": True, "capturable": True}
        self.optimizers = [optimizer(n.parameters(), **adam) for n in (self.generator, self.discriminator)]
        self.noise = torch.randn(batch, self.generator.latent_dim, device=device)
        self.generate, self.judge_both, self.judge_fake = self.generator, self.discriminator_loss, self.generator_loss
        if self.compile_mode:  # three functions: each is one graph forward and one backward
            self.generate, self.judge_both, self.judge_fake = (
                torch.compile(f, mode=self.compile_mode)
                for f in (self.generator, self.discriminator_loss, self.generator_loss)
            )

    def discriminator_loss(self, real, fake):
        return losses.discriminator_loss(self.discriminator(real), self.discriminator(fake))

    def generator_loss(self, fake):
        return losses.generator_loss(self.discriminator(fake))

    def losses_and_gradients(self):
        """Gradients of the discriminator, then of the generator; the two losses."""
        generator_parameters, discriminator_parameters = (
            list(n.parameters()) for n in (self.generator, self.discriminator)
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            fake = self.generate(self.noise)
            d_loss = self.judge_both(self.real, fake.detach())
            d_gradients = torch.autograd.grad(d_loss, discriminator_parameters)
            # A compiled backward computes the gradients of all that asks for one.
            if self.compile_mode:
                self.discriminator.requires_grad_(False)
            g_loss = self.judge_fake(fake)
            g_gradients = torch.autograd.grad(g_loss, generator_parameters)
            if self.compile_mode:
                self.discriminator.requires_grad_(True)
        return d_loss, g_loss, d_gradients, g_gradients

    def __call__(self):
        if self.compile_mode:
            torch.compiler.cudagraph_mark_step_begin()
        d_loss, g_loss, d_gradients, g_gradients = self.losses_and_gradients()
        for optimizer, gradients in zip(self.optimizers, (g_gradients, d_gradients)):
            for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients):
                # In the parameter's strides, as backward() leaves it: a fused optimizer takes no others.
                same = gradient.stride() == parameter.stride()
                parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)
            optimizer.step()
        return d_loss, g_loss


# ---- memory ------------------------------------------------------------------------------------------------------


class Memory:
    """Bytes that one configuration adds to what is allocated already: at its step's peak, and between steps."""

    def __init__(self, device):
        self.counts = device.type == "cuda"
        if self.counts:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self.allocated, self.reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def peak(self, step):
        """step() is a step, or its capture: a replay allocates nothing, and its graph keeps what the capture took."""
        if self.counts:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        result = step()
        if self.counts:
            torch.cuda.synchronize()
            self.peak_bytes = torch.cuda.max_memory_allocated() - self.allocated
            torch.cuda.empty_cache()
            self.kept_bytes = torch.cuda.memory_reserved() - self.reserved
        return result

    def row(self):
        return {"peak_bytes": self.peak_bytes, "kept_bytes": self.kept_bytes} if self.counts else {}


def prepare(device, case, name, steps, compile_format):
    """(what to time, its memory); a compiled step that is already among `steps` is captured as it is."""
    base = name.removesuffix(GRAPH)
    memory = Memory(device)
    step = steps.get(base) if base in COMPILE_MODES else None
    if step is None:
        step = Step(device, case, base, compile_format)
        for _ in range(2):
            step()
    if name.endswith(GRAPH):
        return memory.peak(lambda: captured(step, device)), memory
    memory.peak(step)
    return step, memory


# ---- one case ----------------------------------------------------------------------------------------------------


def losses_agree(device, case, dtype, tolerance):
    """Losses of three steps, fused against plain, with the same seed and at most 16 images."""
    case = (*case[:2], min(case[2], 16))
    plain, fused = Step(device, case, EAGER[dtype]), Step(device, case, f"fastgan {dtype}")
    for _ in range(3):
        for ours, theirs in zip(fused(), plain()):
            if not abs(ours.item() - theirs.item()) <= tolerance * (abs(theirs.item()) + 0.05):
                raise ValueError(f"fused loss {ours.item():.5f}, plain {theirs.item():.5f}")


def dtype_of(name):
    return name.removesuffix(GRAPH).split()[-1]


def run_case(text, names, arguments, results, slowest, begin):
    case = tuple(int(number) for number in text.split("x"))
    batch, device = case[2], torch.device(arguments.device)
    for dtype, tolerance in (("tf32", 0.02), ("bf16", 0.08)):
        fused = [name for name in names if name.startswith("fastgan") and dtype_of(name) == dtype]
        agreed = not fused
        with results.surviving(f"{text} fastgan {dtype} against plain"):
            torch.backends.cudnn.benchmark = False  # not worth a search for a smaller batch
            if fused:
                losses_agree(device, case, dtype, tolerance)
            agreed = True
        torch.backends.cudnn.benchmark = True
        if not agreed:
            names = [name for name in names if name not in fused]
    ready, memory = {}, {}
    for name in names:
        gone, before = time.monotonic() - begin, time.monotonic()
        expected = 0 if name.removesuffix(GRAPH) in ready else slowest.get(name.split()[0], 0)
        expected = max(expected, COMPILE_SECONDS.get(name, 0))
        if gone + expected > arguments.seconds:
            print(
                f"{text} {name}: left out, {gone:.0f} s of {arguments.seconds:.0f} s are gone and it may take "
                f"{expected:.0f} s",
                flush=True,
            )
            continue
        with results.surviving(f"{text} {name}"):
            ready[name], memory[name] = prepare(
                device, case, name, ready, getattr(torch, arguments.compile_format)
            )
        taken = time.monotonic() - before
        slowest[name.split()[0]] = max(slowest.get(name.split()[0], 0), taken)
        if taken > 5:
            print(f"{text} {name}: prepared in {taken:.0f} s", flush=True)
    if not ready:
        return
    times = compare(ready, device, rounds=9, target_seconds=0.03)
    peers = [name for name in times if not name.startswith("fastgan")]
    fastest = min(peers or times, key=lambda n: times[n]["median_s"])
    bound = f"of {EAGER['float32']}" if EAGER["float32"] in times else ""
    print(f"\n{text:32s}       ms  images/s  {bound:>16s}  of fastest peer ({fastest})   peak MiB  of eager  kept MiB")
    for name, row in times.items():
        seconds = row["median_s"]
        row |= memory[name].row()
        of_eager = f"x{times[EAGER['float32']]['median_s'] / seconds:.2f}" if EAGER["float32"] in times else "-"
        line = f"{name:32s} {seconds * 1e3:8.3f} {batch / seconds:9.0f}  {of_eager:>16s}  "
        line += f"x{times[fastest]['median_s'] / seconds:.2f}"
        if "peak_bytes" in row:
            eager = memory.get(EAGER[dtype_of(name)])
            if eager:
                row["peak_of_eager"] = row["peak_bytes"] / eager.peak_bytes
            line += f" {row['peak_bytes'] / 2**20:10.0f}  {row.get('peak_of_eager', float('nan')):8.2f}"
            line += f"  {row['kept_bytes'] / 2**20:8.0f}"
        print(line, flush=True)
    results.add({"image_size": case[0], "channels": case[1], "batch": batch, "times": times})


def jobs(arguments):
    """(case, configurations) in the order in which to run them: what compiles last."""

    def chosen(names):
        return [name for name in names if name in arguments.configurations]

    for text in arguments.cases:
        yield text, chosen(BF16 + (TF32 if text in arguments.tf32_cases else []))
    for compiled in (COMPILED, COMPILED_LAST):
        for text in arguments.compile_cases:
            if chosen(compiled):
                yield text, chosen(REFERENCES) + chosen(compiled)


# ---- profile -----------------------------------------------------------------------------------------------------


def profile(device, text, name, steps=3, most=40):
    """The kernels of one step by their time (on a CPU: the operators)."""
    step = Step(device, tuple(int(number) for number in text.split("x")), name.removesuffix(GRAPH))
    for _ in range(4):
        step()
    cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    rows = [
        (event.self_device_time_total if cuda else event.self_cpu_time_total, event.count, event.key)
        for event in profiler.key_averages()
        if event.device_type == on_device and not getattr(event, "is_user_annotation", False)
    ]
    rows.sort(reverse=True)
    total = sum(row[0] for row in rows) / steps
    print(
        f"\n{text} {name.removesuffix(GRAPH)}: {sum(row[1] for row in rows) / steps:.0f} kernels, {total:.1f} us a step"
    )
    print("us a step  share  calls  kernel")
    for microseconds, count, key in rows[:most]:
        short = key.removeprefix("void ").replace("at::native::", "").replace("fastgan::cuda::", "")[:70]
        share = microseconds / steps / max(total, 1e-9)
        print(f"{microseconds / steps:9.1f} {share:6.1%} {count / steps:6.1f}  {short}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.split("\n\n", 2)[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = BF16 + TF32 + COMPILED + COMPILED_LAST
    parser.add_argument("--output", type=Path, help="required unless --profile")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=210, help="leave out what does not fit into this")
    parser.add_argument(
        "--cases", nargs="+", default=["64x3x128", "64x3x512", "64x3x1024", "32x1x128"], help="size x channels x batch"
    )
    parser.add_argument("--compile-cases", nargs="*", help="cases to compile for; the first by default")
    parser.add_argument("--compile-format", choices=("contiguous_format", "channels_last"), default="contiguous_format")
    parser.add_argument("--tf32-cases", nargs="*", help="cases to run in TF32 too; the first by default")
    parser.add_argument("--configurations", nargs="+", choices=names, metavar="NAME", default=names)
    parser.add_argument("--profile", nargs="+", choices=names, metavar="NAME", help="list kernels, time nothing")
    arguments = parser.parse_args()
    for option in ("compile_cases", "tf32_cases"):
        if getattr(arguments, option) is None:
            setattr(arguments, option, arguments.cases[:1])
    begin, device = time.monotonic(), torch.device(arguments.device)
    torch.backends.cudnn.benchmark = True
    # cuDNN's is PyTorch's default; a DCGAN has no matrix product to which the other could matter.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    if arguments.profile:
        for name in arguments.profile:
            profile(device, arguments.cases[0], name)
        return
    if arguments.output is None:
        parser.error("--output is required")
    results, slowest = Results(arguments.output), {}
    for text, chosen in jobs(arguments):
        if chosen:
            with results.surviving(text):
                run_case(text, chosen, arguments, results, slowest, begin)
        if device.type == "cuda":
            if any(name in COMPILE_MODES for name in chosen):
                torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
    print(f"{time.monotonic() - begin:.0f} s")
    results.exit()


if __name__ == "__main__":
    main()
