"""explain(): says which path a call takes and why, and does nothing else."""

import pytest
import torch

import fastgan
from fastgan import _extension, ops

requires_kernels = pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="no compiled extension")


def layer(device="cpu", dtype=torch.float32):
    tensors = dict(input=(2, 3, 8, 8), weight=(4, 3, 4, 4), bias=(4,))
    return {name: torch.ones(shape, device=device, dtype=dtype) for name, shape in tensors.items()}


@requires_kernels
@pytest.mark.parametrize("op", [ops.conv2d_act, "conv2d_act"], ids=["function", "name"])
def test_fused_cpu_path_names_instruction_set_and_convolution(op):
    text = fastgan.explain(op, **layer(), stride=2, padding=1)
    assert text.startswith("conv2d_act of float32 [2, 3, 8, 8] on cpu: fused CPU kernels")
    assert f"instruction set {fastgan.build_info()['cpu_isa']}" in text
    assert "convolution: " in text


@requires_kernels
@pytest.mark.parametrize("side, kernel, padding, fits", [(4, 4, "valid", True), (1, 2, "same", True), (4, 4, "same", False)])
def test_padding_by_name_is_taken_for_its_numbers(side, kernel, padding, fits):
    image = torch.ones(4, 64, side, side).as_strided((4, 64, side, side), (64 * side**2, 1, 64 * side, 64))
    weight = torch.ones(1, 64, kernel, kernel)
    assert ("fastgan's for images to one pixel" in fastgan.explain("conv2d_act", image, weight, padding=padding)) == fits
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.conv2d_act(image, weight, padding=padding)
    assert ("fastgan::to_pixel" in [event.name for event in profile.events()]) == fits


@requires_kernels
@pytest.mark.parametrize("op, loop, longest", [("conv2d_act", "conv4x4s2_down", 513), ("conv_transpose2d_act", "conv4x4s2_up", 256)])
def test_minimal_filtering_is_said_of_the_sides_it_takes(op, loop, longest):
    weight = torch.ones(16, 16, 4, 4)
    for side, fits in ((longest, True), (longest + 1, False)):
        image = torch.ones(1, 16, 4, side).contiguous(memory_format=torch.channels_last)
        text = fastgan.explain(op, image, weight, stride=2, padding=1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            getattr(ops, op)(image, weight, stride=2, padding=1)
        assert (f"fastgan::{loop}" in [event.name for event in profile.events()]) == ("fastgan's minimal filtering for" in text) == fits


@requires_kernels
def test_negative_slope_below_zero_leaves_the_fused_kernels_without_batch_norm():
    below = dict(activation="leaky_relu", negative_slope=-0.1)
    assert "negative_slope is below 0" in fastgan.explain(ops.conv2d_act, **layer(), **below)
    assert "fused CPU kernels" in fastgan.explain(ops.conv2d_bn_act, **layer(), **below)
    assert "fused CPU kernels" in fastgan.explain(ops.conv2d_act, **layer(), activation="relu", negative_slope=-0.1)


@requires_kernels
def test_negative_slope_below_zero_stays_in_the_loops_that_keep_the_activations_argument():
    image, weight = torch.ones(2, 16, 8, 8).contiguous(memory_format=torch.channels_last), torch.ones(32, 16, 4, 4)
    below = dict(activation="leaky_relu", negative_slope=-0.1)
    text = fastgan.explain("conv2d_act", image, weight, stride=2, padding=1, **below)
    assert "fused CPU kernels" in text and "negative_slope" not in text and "minimal filtering" in text
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.conv2d_act(image, weight, stride=2, padding=1, **below)
    assert "fastgan::conv4x4s2_down" in [event.name for event in profile.events()]
    assert "negative_slope is below 0" in fastgan.explain("conv2d_act", image, weight, padding=1, **below)
    assert "fused CPU kernels" in fastgan.explain("batch_norm_act_noise", torch.ones(4, 3), **below)


@requires_kernels
def test_instruction_set_chosen_by_the_environment_is_named_as_such(monkeypatch):
    monkeypatch.setenv("FASTGAN_CPU_ISA", fastgan.build_info()["cpu_isa"])
    assert "FASTGAN_CPU_ISA asks for it" in fastgan.explain("conv2d_act", **layer())


@requires_kernels
def test_autocast_decides_the_dtype_of_the_convolution():
    with torch.autocast("cpu", torch.bfloat16):
        assert "bfloat16" in fastgan.explain("conv2d_act", **layer())
        assert "bfloat16" not in fastgan.explain("conv2d_act", **layer(dtype=torch.float64))


@requires_kernels
def test_meta_tensors_compute_shapes_only():
    assert "shapes only" in fastgan.explain("conv2d_act", **layer("meta"))


def test_missing_kernels_are_explained_by_their_cause(monkeypatch):
    monkeypatch.setattr(_extension, "_DEVICES", frozenset())
    monkeypatch.setattr(_extension, "_C", None)
    monkeypatch.setattr(_extension, "_missing_reason", "the moon is full")
    text = fastgan.explain("conv2d_act", **layer())
    assert "plain PyTorch\n  conv2d_act_reference, because" in text and "the moon is full" in text
    assert "FASTGAN_STRICT" not in text
    monkeypatch.setenv("FASTGAN_STRICT", "1")
    assert "FASTGAN_STRICT=1 makes this call an error" in fastgan.explain("conv2d_act", **layer())


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "shapes, options, loop",
    [
        (((2, 16, 8, 8), (32, 16, 4, 4)), dict(stride=2, padding=1), "fastgan's"),
        (((2, 16, 4, 4), (1, 16, 4, 4)), dict(), "fastgan's"),  # down to one pixel
        (((2, 16, 8, 8), (32, 16, 4, 4)), dict(), "ATen's"),
        (((2, 16, 8, 8), (32, 8, 4, 4)), dict(stride=2, padding=1, groups=2), "ATen's"),
        (((2, 16, 8, 8), (32, 16, 3, 3)), dict(stride=2, padding=1), "ATen's"),
    ],
)
def test_cuda_convolution_loop_goes_by_the_layer(monkeypatch, shapes, options, loop):
    monkeypatch.setattr(_extension, "_DEVICES", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(_extension, "why_not_on_gpu", lambda device: None)
    input, weight = (torch.ones(shape, dtype=torch.bfloat16).as_subclass(OnCuda) for shape in shapes)
    text = fastgan.explain("conv2d_act", input, weight, **options)
    assert "fused CUDA kernels" in text and f"convolution: {loop}" in text
    assert "run on these GPUs: " in text
    assert "convolution: ATen's" in fastgan.explain("conv2d_act", input.float(), weight.float(), **options)
    assert "no fused CUDA kernels" in fastgan.explain("conv2d_act", input.double(), weight.double(), **options)


def test_a_gpu_without_kernels_is_said(monkeypatch):
    monkeypatch.setattr(_extension, "_DEVICES", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(_extension, "why_not_on_gpu", lambda device: "the GPU is too old")
    image = torch.ones(2, 16, 8, 8).as_subclass(OnCuda)
    text = fastgan.explain("conv2d_act", image, torch.ones(32, 16, 4, 4), stride=2, padding=1)
    assert "plain PyTorch" in text and "because the GPU is too old" in text


def test_operators_without_a_cuda_kernel_are_said(monkeypatch):
    monkeypatch.setattr(_extension, "_DEVICES", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(_extension, "why_not_on_gpu", lambda device: None)
    rows = torch.ones(4, 3).as_subclass(OnCuda)
    assert _extension.WITHOUT_CUDA_KERNEL < set(ops.__all__)
    assert "because batch_norm_act_noise has no CUDA kernel" in fastgan.explain("batch_norm_act_noise", rows)
    assert "fused CUDA kernels" in fastgan.explain("softmax_entropy", rows)


@pytest.mark.parametrize(
    "batch, side, share",
    # Products along the two parities of each side, over 2 * outputs of each: the cuts of csrc/cpu/conv4x4s2_tiles.h.
    [
        (2, 8, (5 + 5) ** 2 / 16**2), (2, 14, (9 + 9) ** 2 / 28**2), (1, 16, (11 + 11) ** 2 / 32**2), (2, 16, (10 + 10) ** 2 / 32**2),
        (2, 9, (5 + 6) ** 2 / 16**2),
    ],
)  # fmt: skip
def test_explain_says_what_minimal_filtering_saves(batch, side, share):
    input = torch.ones(batch, 16, side, side).contiguous(memory_format=torch.channels_last)
    text = fastgan.explain("conv2d_act", input, torch.ones(32, 16, 4, 4), stride=2, padding=1)
    assert f"about {share:.0%} of direct convolution's multiplications for {side // 2}x{side // 2} pixels" in text


def test_explain_names_the_image_loops():
    image = torch.ones(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    text = fastgan.explain("conv2d_act", image, torch.ones(16, 3, 4, 4), stride=2, padding=1)
    assert "for images of up to 4 channels" in text and "F(2, 2), 75%" in text


@requires_kernels
@pytest.mark.parametrize("isa, batch, channels, words", [
    ("avx2", 16, 32, "the loops with bfloat16 products run on processors with AVX512-BF16 or AMX, which this is not"),
    ("avx2", 2, 3, "the loops with bfloat16 products run on processors with AVX512-BF16 or AMX, which this is not"),
    ("avx512_bf16", 16, 16, "multiplied as floats: the loops with bfloat16 products take channels in multiples of 32"),
    ("avx512_bf16", 300, 16, "faster for so many pixels without gradients; fastgan's loops with bfloat16 products take channels in"),
    ("avx512_bf16", 15, 32, "multiplied as floats: the loops with bfloat16 products take a layer like this from a batch of 16 on"),
    ("avx512_bf16", 16, 32, "fastgan's in bfloat16, batch norm and activation fused in: minimal filtering along the rows, F(2, 2)"),
    ("avx512_bf16", 2, 3, "fastgan's in bfloat16, with direct products"),
    ("amx", 16, 32, "fastgan's in bfloat16, with direct products"),
    ("amx", 16, 16, "ATen's (oneDNN) in bfloat16; fastgan's loops take channels in multiples of 32 (of 16 inside a Sequential"),
    ("amx", 15, 32, "ATen's (oneDNN) in bfloat16; fastgan's loops take a layer like this from a batch of 16 on"),
])  # fmt: skip
def test_explain_says_which_products_bfloat16_images_take(monkeypatch, isa, batch, channels, words):
    monkeypatch.setattr(_extension, "CPU_ISA", isa)
    image, weight = torch.ones(batch, channels, 8, 8).to(memory_format=torch.channels_last), torch.ones(32, channels, 4, 4)

    def explain(image, weight=weight, padding=1):
        return fastgan.explain("conv2d_act", image, weight, stride=2, padding=padding)

    with torch.autocast("cpu", torch.bfloat16):
        assert words in explain(image)
        assert "ATen's (oneDNN) in bfloat16; fastgan's loops take this in channels_last" in explain(image.contiguous())
        assert "convolution: ATen's" in explain(image, padding=0)
    filtered = words.endswith("F(2, 2)")
    assert ("would add to the error of bfloat16 weights" in explain(image.bfloat16(), weight.bfloat16())) == filtered


def test_explain_changes_no_buffer_and_runs_no_operator():
    running = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fastgan.explain(ops.conv2d_bn_act, **layer(), **running, stride=2, padding=1, training=True)
    assert not [event.name for event in profile.events() if event.name.startswith(("aten::conv", "fastgan::"))]
    assert running["running_mean"].eq(0).all() and running["running_var"].eq(1).all()


@pytest.mark.parametrize("op", ["conv3d", torch.relu, None, "ACTIVATIONS"])
def test_unknown_operator_is_an_error_that_lists_the_known(op):
    with pytest.raises(ValueError, match="explain: op must be a function of fastgan.ops or its name, one of batch_norm_act_noise, conv2d_act"):
        fastgan.explain(op)


def test_arguments_the_operator_does_not_take_are_an_error():
    with pytest.raises(TypeError, match="explain: conv2d_act cannot be called like this.*weight"):
        fastgan.explain("conv2d_act", torch.ones(1, 3, 8, 8))
    with pytest.raises(TypeError, match="first argument of conv2d_act must be a torch.Tensor, got int"):
        fastgan.explain("conv2d_act", 1, 2)
