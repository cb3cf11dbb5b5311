"""What only a GPU can show: streams, graphs, synchronisation, determinism, TF32, unchecked labels."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conv_cases import OPS, dcgan_case
from test_conv_stack import build, step

import fastgan
from fastgan import _extension
from fastgan.ops import softmax_entropy, softmax_entropy_cross_entropy

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _extension.has_kernels("cuda")), reason="no CUDA device, or no CUDA kernels"
)


@contextmanager
def setting(read, write, value):
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def deterministic():
    return setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True)


# A layer on fastgan's main loop, and one on cuDNN between the fused kernels.
LAYERS = {"kernel 4": dict(kernel=4, padding=1), "kernel 3": dict(kernel=3, padding=1)}


def run_everything(dtype=torch.float32):
    """Outputs, gradients and running statistics of every operator and of whole networks, as one list of tensors."""
    results = []
    for op, (function, _) in OPS.items():
        for layer in LAYERS.values():
            output, gradients, running = dcgan_case(op, 16, 32, 16, batch=8, **layer).run(function, dtype, "cuda")
            results += [output, *gradients.values(), *running.values()]
    for name in ("generator", "discriminator"):
        network, x = build(name, device="cuda")
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            results += [*step(fastgan.fuse(network), x), *network.buffers()]
    logits = torch.randn(5000, 10, generator=torch.Generator().manual_seed(0)).to("cuda", dtype).requires_grad_()
    labels = torch.arange(5000, device="cuda") % 10
    values = softmax_entropy_cross_entropy(logits, labels)
    return [*results, *values, *torch.autograd.grad(values[0] - 2 * values[1] + values[2], logits)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_runs_are_bit_identical_under_deterministic_algorithms(dtype):
    with deterministic():
        first, again = run_everything(dtype), run_everything(dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_operator_waits_for_the_device():
    run_everything()  # cuDNN chooses its algorithms
    case = dcgan_case("conv2d_bn_act", 16, 32, 16)
    tensors, running = case.make(torch.float32, "cuda")
    logits = torch.randn(50, 10, device="cuda", requires_grad=True)
    labels = torch.zeros(50, dtype=torch.int64, device="cuda")
    network, images = build("discriminator", device="cuda")
    network = fastgan.fuse(network)
    with setting(torch.cuda.get_sync_debug_mode, torch.cuda.set_sync_debug_mode, "error"):
        output = OPS[case.op][0](**tensors, **running, **case.options)
        torch.autograd.grad(output.sum(), list(tensors.values()))
        with torch.autocast("cuda", torch.bfloat16):
            output = network(images)
        torch.autograd.grad(output.sum(), list(network.parameters()))
        torch.autograd.grad(sum(softmax_entropy_cross_entropy(logits, labels)), logits)


def test_every_kernel_runs_on_the_current_stream():
    case = dcgan_case("conv2d_bn_act", 16, 32, 16, batch=8)
    function = OPS[case.op][0]
    stream = torch.cuda.Stream()
    with deterministic():
        expected = [*case.run(function, torch.float32, "cuda")[0], *run_everything()]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            tensors, running = case.make(torch.float32, "cuda")
            late = {name: torch.full_like(value.detach(), float("nan")) for name, value in tensors.items()}
            torch.cuda._sleep(50_000_000)  # a kernel on another stream would now read the NaNs
            late = {name: late[name].copy_(value.detach()) for name, value in tensors.items()}
            found = [*function(**late, **running, **case.options), *run_everything()]
        torch.cuda.current_stream().wait_stream(stream)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def train_step(generator, discriminator, optimizers, noise, images):
    """One step of both networks on fixed tensors."""
    loss = fastgan.losses.discriminator_loss(discriminator(images), discriminator(generator(noise).detach()))
    optimizers[1].zero_grad(set_to_none=True)
    loss.backward()
    optimizers[1].step()
    optimizers[0].zero_grad(set_to_none=True)
    fastgan.losses.generator_loss(discriminator(generator(noise))).backward()
    optimizers[0].step()


def test_training_step_captured_in_a_graph_equals_the_eager_step():
    torch.manual_seed(0)
    networks = [
        fastgan.fuse(network.cuda())
        for network in fastgan.models.dcgan(image_size=32, channels=1, latent_dim=20, base_channels=16)
    ]
    noise, images = torch.empty(8, 20, device="cuda"), torch.empty(8, 1, 32, 32, device="cuda")
    batches = [(torch.randn_like(noise), torch.rand_like(images) * 2 - 1) for _ in range(3)]

    def trained(capture):
        mine = copy.deepcopy(networks)
        optimizers = [torch.optim.SGD(network.parameters(), lr=0.01) for network in mine]
        noise.copy_(batches[0][0])
        images.copy_(batches[0][1])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # what capture needs before it, and the eager run does as well
                train_step(*mine, optimizers, noise, images)
        torch.cuda.current_stream().wait_stream(stream)
        step = lambda: train_step(*mine, optimizers, noise, images)  # noqa: E731
        if capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        for new_noise, new_images in batches:
            noise.copy_(new_noise)
            images.copy_(new_images)
            step()
        return [value for network in mine for value in network.state_dict().values()]

    with deterministic():
        eager, captured = trained(False), trained(True)
    torch.testing.assert_close(captured, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", ["conv2d_act", "conv_transpose2d_act"])
def test_tf32_is_used_where_cudnn_may_use_it_and_nowhere_else(op, monkeypatch):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    case = dcgan_case(op, 64, 64, 16, batch=4, activation="identity")
    exact = case.run(OPS[op][1], torch.float64, "cuda")
    errors = {}
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        found = case.run(OPS[op][0], torch.float32, "cuda")
        pairs = [(exact[0], found[0]), *((exact[1][name], found[1][name]) for name in ("input", "weight"))]
        errors[allowed] = [((a - b.double()).abs().max() / a.abs().max()).item() for a, b in pairs]
    assert max(errors[False]) < 1e-5
    # Of which of the three convolutions cuDNN makes use of it is its choice.
    assert 3e-5 < max(errors[True]) < 3e-3


def kernels_of(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        result = run()
        torch.cuda.synchronize()
    return result, " ".join(event.name for event in profiler.events())


# In channels_last, without an activation, whose derivative may jump between two roundings of a sum; with the kernels of ours that run where TF32 is allowed.
FLOAT32_LAYERS = {
    "thin image down": (dcgan_case("conv2d_act", 3, 64, 64, batch=16, activation="identity"), ["tf32_down_kernel", "tf32_up_kernel", "tf32_weight"]),
    "thin image up": (
        dcgan_case("conv_transpose2d_act", 64, 1, 14, batch=16, activation="identity"),
        ["tf32_up_kernel", "tf32_down_kernel", "tf32_weight"],
    ),
    "down": (dcgan_case("conv2d_bn_act", 64, 128, 32, batch=80, activation="identity"), ["gather_box_kernel"]),
    "up": (dcgan_case("conv_transpose2d_bn_act", 256, 128, 8, batch=80, activation="identity"), ["gather_box_kernel"]),
    "to one pixel": (
        dcgan_case("conv2d_act", 512, 1, 4, batch=16, stride=1, padding=0, activation="identity"),
        ["pixel_down_kernel", "pixel_up_kernel", "pixel_weight"],
    ),
}


@pytest.mark.parametrize("layer", FLOAT32_LAYERS)
def test_float32_layers_in_channels_last(layer, monkeypatch):
    case, kernels = FLOAT32_LAYERS[layer]
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        pytest.skip("this GPU has no TF32")
    case = replace(case, layout="channels_last")
    exact = case.run(OPS[case.op][1], torch.float64, "cuda")
    for allowed, most in ((False, 1e-5), (True, 3e-3)):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        found, names = kernels_of(lambda: case.run(OPS[case.op][0], torch.float32, "cuda"))
        for a, b in ((exact[0], found[0]), *((exact[1][name], found[1][name]) for name in ("input", "weight"))):
            assert (a - b.double()).abs().max() <= most * a.abs().max()
        ours = {kernel: kernel in names for kernel in kernels}
        if kernels == ["gather_box_kernel"]:
            assert ours["gather_box_kernel"] == (allowed and capability[0] == 9)
        else:
            assert all(used == (allowed or layer == "to one pixel") for used in ours.values()), ours


def test_one_channel_output_has_the_strides_pytorch_gives_it():
    for op in ("conv_transpose2d_act", "conv_transpose2d_bn_act"):
        case = dcgan_case(op, 16, 1, 8)
        ours, theirs = (case.run(function, torch.float32, "cuda")[0] for function in OPS[op])
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_label_out_of_range_makes_the_cross_entropy_nan_and_the_device_goes_on(dtype):
    logits = torch.randn(3, 5, dtype=dtype, device="cuda", requires_grad=True)
    values = softmax_entropy_cross_entropy(logits, torch.tensor([0, 5, -1], device="cuda"))
    assert values[2].isnan() and values[0].isfinite() and values[1].isfinite()
    torch.autograd.grad(values[2], logits, create_graph=True)
    torch.autograd.grad(values[2], logits)
    torch.cuda.synchronize()
    assert softmax_entropy(logits)[0].isfinite()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_tensors_decide_the_device_not_the_current_one():
    case = dcgan_case("conv2d_bn_act", 16, 32, 16)
    expected = case.run(OPS[case.op][0], torch.float32, "cuda:0")
    found = case.run(OPS[case.op][0], torch.float32, "cuda:1")
    torch.testing.assert_close(found[0].cpu(), expected[0].cpu())


@pytest.mark.parametrize("which", ["generator", "discriminator", "discriminator with a bias"])
def test_large_outputs_are_computed_again_in_backward(which):
    """Beyond kSavedBytes and kWholeBytes of csrc/ops/cuda_conv_stack_plan.h, with halves that are no whole tiles: 150 and 151."""
    torch.manual_seed(0)
    generator, discriminator = fastgan.models.dcgan(64, 3)
    network = generator if which == "generator" else discriminator
    if "bias" in which:
        first = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
        first.bias = torch.nn.Parameter(torch.randn(first.out_channels) * 0.1)
    network = network.cuda()
    x = torch.rand(301, *((100, 1, 1) if which == "generator" else (3, 64, 64)), device="cuda") * 2 - 1
    exact = step(copy.deepcopy(network).double(), x.double())
    fused, bytes_saved = fastgan.fuse(copy.deepcopy(network)), []
    parameters = list(fused.parameters())
    with torch.autocast("cuda", torch.bfloat16):
        plain, ours = step(copy.deepcopy(network), x), step(fused, x)
        for wanted, expected in (([x.requires_grad_()], ours[1:2]), (parameters, ours[2:])):
            output = fused(x)
            grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
            assert all(map(torch.equal, torch.autograd.grad(output, wanted, grad), expected))
        for module in (network, fused):
            before = torch.cuda.memory_allocated()
            output = module(x)
            bytes_saved.append(torch.cuda.memory_allocated() - before)
            del output
    for e, p, o in zip(exact, plain, ours, strict=True):
        assert (o.double() - e).norm() <= 2 * (p.double() - e).norm() + 1e-6 * e.norm()
    # In units of the largest layer: 2.75 to 0.9 of a discriminator; 3.75 to 2 and twice the image, 0.2, of a generator.
    assert bytes_saved[1] < 0.68 * bytes_saved[0]
