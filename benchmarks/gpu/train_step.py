"""A whole DCGAN training step (discriminator, generator, Adam): PyTorch's ways against fastgan, in one process.

    python benchmarks/gpu/train_step.py --output train_step.json [--device cuda] [--seconds 210]

Configurations: eager (float32, contiguous); channels_last + bfloat16 autocast; the same captured in a CUDA graph; the
same under torch.compile; fused by fastgan; fused and captured. A configuration that no longer fits --seconds is left
out and said so.
"""

import argparse
import time
from pathlib import Path

import torch
from timing import compare, write

import fastgan
from fastgan import losses, models


class Step:
    """One training step on a fixed batch, with everything it needs."""

    def __init__(self, device, image_size, channels, batch, *, fused=False, mixed=True, compile_mode=None):
        torch.manual_seed(0)
        self.device, self.mixed = device, mixed
        self.generator, self.discriminator = (n.to(device) for n in models.dcgan(image_size, channels))
        self.real = torch.rand(batch, channels, image_size, image_size, device=device) * 2 - 1
        if mixed:
            self.generator, self.discriminator = (
                n.to(memory_format=torch.channels_last) for n in (self.generator, self.discriminator)
            )
            self.real = self.real.contiguous(memory_format=torch.channels_last)
        if fused:
            self.generator, self.discriminator = fastgan.fuse(self.generator), fastgan.fuse(self.discriminator)
        adam = dict(lr=2e-4, betas=(0.5, 0.999))
        if mixed and device.type == "cuda":  # plain eager keeps the optimizer's defaults
            adam |= dict(fused=True, capturable=True)
        self.optimizers = [torch.optim.Adam(n.parameters(), **adam) for n in (self.generator, self.discriminator)]
        self.noise = torch.randn(batch, self.generator.latent_dim, device=device)
        self.run = (
            torch.compile(self.losses_and_gradients, mode=compile_mode) if compile_mode else self.losses_and_gradients
        )

    def losses_and_gradients(self):
        """Gradients of the discriminator, then of the generator; the two losses."""
        generator_parameters, discriminator_parameters = (
            list(n.parameters()) for n in (self.generator, self.discriminator)
        )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed):
            fake = self.generator(self.noise)
            real_logits, fake_logits = self.discriminator(self.real), self.discriminator(fake.detach())
            d_loss = losses.discriminator_loss(real_logits, fake_logits)
            d_gradients = torch.autograd.grad(d_loss, discriminator_parameters)
            g_loss = losses.generator_loss(self.discriminator(fake))
            g_gradients = torch.autograd.grad(g_loss, generator_parameters)
        return d_loss, g_loss, d_gradients, g_gradients

    def __call__(self):
        d_loss, g_loss, d_gradients, g_gradients = self.run()
        for optimizer, gradients in zip(self.optimizers, (g_gradients, d_gradients)):
            for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients):
                parameter.grad = gradient
            optimizer.step()
        return d_loss, g_loss


def captured(step):
    """The step as a CUDA graph; calling the result replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def configurations(device, image_size, channels, batch):
    """Name to a function that makes the callable; the slow ones to prepare last."""

    def make(capture=False, **options):
        def build():
            step = Step(device, image_size, channels, batch, **options)
            return captured(step) if capture else step

        return build

    yield "eager float32", make(mixed=False)
    yield "channels_last bf16", make()
    yield "fastgan bf16", make(fused=True)
    if device.type == "cuda":
        yield "channels_last bf16 graph", make(capture=True)
        yield "fastgan bf16 graph", make(fused=True, capture=True)
        yield "compile default bf16", make(compile_mode="default")
        yield "compile reduce-overhead bf16", make(compile_mode="reduce-overhead")


def losses_agree(device, image_size, channels, batch):
    """Losses of three steps, fused against plain, in float32 and with the same seed."""
    plain, fused = (Step(device, image_size, channels, batch, fused=fused, mixed=False) for fused in (False, True))
    for _ in range(3):
        for ours, theirs in zip(fused(), plain()):
            if abs(ours.item() - theirs.item()) > 0.02 * abs(theirs.item()) + 1e-3:
                raise SystemExit(f"{image_size} px: fused loss {ours.item():.5f}, plain {theirs.item():.5f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=210, help="leave out what does not fit into this")
    parser.add_argument(
        "--cases", nargs="+", default=["64x3x128", "32x1x128", "64x3x1024"], help="size x channels x batch"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    begin, torch.backends.cudnn.benchmark = time.monotonic(), True
    results = []
    for case in arguments.cases:
        image_size, channels, batch = (int(number) for number in case.split("x"))
        losses_agree(device, image_size, channels, min(batch, 16))
        ready, slowest = {}, 0.0
        for name, build in configurations(device, image_size, channels, batch):
            before = time.monotonic()
            if before - begin + slowest > arguments.seconds:
                print(
                    f"{case} {name}: left out, {before - begin:.0f} s of {arguments.seconds:.0f} s are gone", flush=True
                )
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step = build()
            step()
            ready[name] = step
            slowest = max(slowest, time.monotonic() - before)
        times = compare(ready, device, rounds=9, target_seconds=0.05)
        fastest = min((n for n in times if not n.startswith("fastgan")), key=lambda n: times[n]["median_s"])
        for name, row in times.items():
            print(
                f"{case} {name:32s} {row['median_s'] * 1e3:8.3f} ms  {batch / row['median_s']:10.0f} images/s  "
                f"x{times['eager float32']['median_s'] / row['median_s']:.2f} of eager  "
                f"x{times[fastest]['median_s'] / row['median_s']:.2f} of {fastest}",
                flush=True,
            )
        results.append({"image_size": image_size, "channels": channels, "batch": batch, "times": times})
        write(arguments.output, results)


if __name__ == "__main__":
    main()
