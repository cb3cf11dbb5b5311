"""softmax_entropy and softmax_entropy_cross_entropy."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgan import _extension
from fastgan.ops import softmax_entropy, softmax_entropy_cross_entropy
from fastgan.ops.softmax_entropy import softmax_entropy_cross_entropy_reference, softmax_entropy_reference

needs_kernels = pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="the compiled extension is missing")


def random_logits(rows, classes, dtype=torch.float64, scale=3.0, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(device, dtype)


def random_labels(rows, classes, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[::3] = -100
    return labels.to(device)


def outputs_and_gradient(function, logits, weights):
    logits = logits.detach().requires_grad_()
    outputs = function(logits)
    total = sum(weight * output for weight, output in zip(weights, outputs))
    return [output.detach() for output in outputs], torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("rows, classes", [(1, 1), (1, 10), (7, 3), (16, 10), (33, 17), (100, 10), (5000, 10), (3, 1000)])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
)
def test_values_and_gradient_match_float64_pytorch(rows, classes, dtype, tolerance, device):
    logits, labels = random_logits(rows, classes, dtype, device=device), random_labels(rows, classes, device=device)
    weights = (2.0, -3.0, 0.5)
    values, gradient = outputs_and_gradient(lambda x: softmax_entropy_cross_entropy(x, labels), logits, weights)
    expected, expected_gradient = outputs_and_gradient(
        lambda x: softmax_entropy_cross_entropy_reference(x, labels), logits.double(), weights
    )
    for value, reference in zip(values, expected):
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(value.double(), reference, atol=3e-6 if dtype != torch.float64 else 1e-12, rtol=1e-6)
    assert gradient.dtype == dtype
    assert (gradient.double() - expected_gradient).abs().max() <= tolerance * expected_gradient.abs().max() + 1e-12
    assert list(softmax_entropy(logits)) == values[:2]


def test_one_hot_rows_have_exactly_no_entropy_and_no_gradient(device):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 0.0, 1e4]], device=device, requires_grad=True)
    conditional, marginal = softmax_entropy(logits)
    assert conditional.item() == 0.0
    assert marginal.item() == pytest.approx(math.log(2), abs=1e-7)
    assert torch.equal(torch.autograd.grad(3 * conditional - marginal, logits)[0], torch.zeros_like(logits))


def test_uniform_rows_have_the_entropy_log_k(device):
    for scale in (0.0, 1e4, -1e4):
        conditional, marginal = softmax_entropy(torch.full((5, 10), scale, device=device))
        assert conditional.item() == pytest.approx(math.log(10), abs=1e-6)
        assert marginal.item() == pytest.approx(math.log(10), abs=1e-6)


def test_a_single_class_has_no_entropy(device):
    logits = torch.randn(4, 1, device=device, requires_grad=True)
    conditional, marginal = softmax_entropy(logits)
    assert conditional.item() == 0.0 and marginal.item() == 0.0
    assert torch.equal(torch.autograd.grad(conditional + marginal, logits)[0], torch.zeros_like(logits))


def test_minus_infinity_means_probability_zero(device):
    logits = torch.tensor([[0.0, 0.0, -math.inf]], device=device, requires_grad=True)
    conditional, marginal = softmax_entropy(logits)
    assert conditional.item() == pytest.approx(math.log(2), abs=1e-6)
    assert marginal.item() == pytest.approx(math.log(2), abs=1e-6)
    assert torch.isfinite(torch.autograd.grad(conditional - marginal, logits)[0]).all()


def test_nan_is_not_hidden(device):
    logits = torch.zeros(40, 3, device=device)
    logits[20, 1] = math.nan
    assert all(value.isnan() for value in softmax_entropy(logits))


@pytest.mark.parametrize("output", ["conditional entropy", "cross-entropy"])
def test_a_nan_stays_in_its_row_where_the_marginal_entropy_has_no_gradient(output, device):
    logits = random_logits(40, 3, torch.float32, device=device)
    logits[20, 1] = math.nan
    logits.requires_grad_()
    conditional, _, cross_entropy = softmax_entropy_cross_entropy(logits, random_labels(40, 3, device=device))
    rows = torch.autograd.grad(conditional if output == "conditional entropy" else cross_entropy, logits)[0].isnan()
    assert rows[20].all() and rows.sum() == 3


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_large_gradient_of_a_class_of_probability_zero_is_zero(create_graph, device):
    logits = torch.tensor([[0.0, -math.inf, 1.0], [0.0, 1.0, 2.0]], device=device, requires_grad=True)
    conditional = softmax_entropy(logits)[0]
    one = torch.autograd.grad(conditional, logits, retain_graph=True)[0]
    large = torch.autograd.grad(1e30 * conditional, logits, create_graph=create_graph)[0]
    assert large[0, 1] == 0
    torch.testing.assert_close(large.detach() / 1e30, one)


def test_large_offsets_keep_their_digits(device):
    logits = random_logits(50, 10, torch.float32, device=device)
    shifted = logits + 8192.0  # exact in float32 up to its spacing of 2^-10
    exact = softmax_entropy_reference(shifted.double())
    for value, reference in zip(softmax_entropy(shifted), exact):
        assert value.item() == pytest.approx(reference.item(), abs=2e-6)


@pytest.mark.parametrize("make", [lambda x: x.t().contiguous().t(), lambda x: x[::2], lambda x: x[:, 2:7], lambda x: x[:1].expand(9, -1)])
def test_strided_logits(make, device):
    strided = make(random_logits(12, 10, torch.float32, device=device))
    values, gradient = outputs_and_gradient(softmax_entropy, strided, (1.0, -1.0))
    expected, expected_gradient = outputs_and_gradient(softmax_entropy, strided.contiguous(), (1.0, -1.0))
    assert values == expected
    assert torch.equal(gradient, expected_gradient)


def test_cross_entropy_is_that_of_the_labeled_rows(device):
    logits, labels = random_logits(20, 4, torch.float32, device=device), random_labels(20, 4, device=device)
    cross_entropy = softmax_entropy_cross_entropy(logits, labels)[2]
    torch.testing.assert_close(cross_entropy, torch.nn.functional.cross_entropy(logits, labels))


def test_without_any_label_the_cross_entropy_and_its_gradient_are_zero(device):
    logits = torch.randn(5, 4, device=device, requires_grad=True)
    cross_entropy = softmax_entropy_cross_entropy(logits, torch.full((5,), -100, device=device))[2]
    assert cross_entropy.item() == 0.0
    assert torch.equal(torch.autograd.grad(cross_entropy, logits)[0], torch.zeros_like(logits))


@pytest.mark.parametrize("function", [softmax_entropy, softmax_entropy_reference])
@pytest.mark.parametrize(
    "logits, error, message",
    [
        (torch.randn(3), RuntimeError, r"softmax_entropy: logits must have shape \[N, K\], got \[3\]"),
        (torch.randn(0, 3), RuntimeError, r"softmax_entropy: logits must have at least one row .* got shape \[0, 3\]"),
        (torch.randn(3, 0), RuntimeError, r"softmax_entropy: logits must have at least one class .* \[3, 0\]"),
        (torch.ones(3, 3, dtype=torch.int64), TypeError, "softmax_entropy: logits must be of a floating-point dtype"),
    ],
)
def test_errors_of_logits_name_what_is_wrong(function, logits, error, message):
    with pytest.raises(error, match=message):
        function(logits)


@pytest.mark.parametrize("function", [softmax_entropy_cross_entropy, softmax_entropy_cross_entropy_reference])
@pytest.mark.parametrize(
    "labels, error, message",
    [
        (torch.zeros(4, dtype=torch.int64), RuntimeError, r"labels must have shape \[3\] \(logits.size\(0\)\), got \[4\]"),
        (torch.zeros(3), TypeError, "labels must be of dtype int64, got"),
        (torch.tensor([0, 5, 1]), IndexError, r"labels must lie in \[0, 5\) .* got 5 at row 1"),
        (torch.tensor([0, 1, -1]), IndexError, r"labels must lie in \[0, 5\) .* got -1 at row 2"),
    ],
)
def test_errors_of_labels_name_what_is_wrong(function, labels, error, message):
    with pytest.raises(error, match=message):
        function(torch.randn(3, 5), labels)


def test_derivatives_up_to_third_order(device):
    logits = random_logits(4, 3, device=device).requires_grad_()
    labels = torch.tensor([0, -100, 2, 1], device=device)

    def total(x):
        conditional, marginal, cross_entropy = softmax_entropy_cross_entropy(x, labels)
        return conditional.square() - 2 * marginal + conditional * cross_entropy

    assert torch.autograd.gradcheck(total, logits)
    assert torch.autograd.gradgradcheck(total, logits)

    def curvature(x):
        gradient = torch.autograd.grad(total(x), x, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(curvature, logits)


@pytest.mark.parametrize("index", [0, 1])
def test_each_output_alone_is_differentiable(index):
    logits = random_logits(6, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: softmax_entropy(x)[index], logits)
    assert torch.autograd.gradgradcheck(lambda x: softmax_entropy(x)[index], logits)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, device):
    logits, labels = random_logits(5, 4, dtype, device=device).requires_grad_(), random_labels(5, 4, device=device)
    torch.library.opcheck(torch.ops.fastgan.softmax_entropy_forward.default, (logits, None, -100))
    torch.library.opcheck(torch.ops.fastgan.softmax_entropy_forward.default, (logits, labels, -100))
    torch.library.opcheck(torch.ops.fastgan.softmax_entropy.default, (logits,))


def test_compiles_without_graph_break(device):
    labels = random_labels(9, 4, device=device)

    def loss(x):
        conditional, marginal = softmax_entropy(x)
        return conditional - marginal + softmax_entropy_cross_entropy(x, labels)[2]

    logits = random_logits(9, 4, torch.float32, device=device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    _, expected = outputs_and_gradient(lambda x: (loss(x),), logits, (1.0,))
    _, gradient = outputs_and_gradient(lambda x: (compiled(x),), logits, (1.0,))
    torch.testing.assert_close(gradient, expected)


def test_entropies_stay_float32_under_autocast(device):
    logits = random_logits(50, 10, torch.bfloat16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        values = softmax_entropy(logits)
    for value, reference in zip(values, softmax_entropy_reference(logits.double())):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(reference.item(), abs=2e-6)


def test_results_do_not_depend_on_the_number_of_threads_or_the_run():
    logits = random_logits(20_000, 10, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(outputs_and_gradient(softmax_entropy, logits, (1.0, -1.0)))
    finally:
        torch.set_num_threads(threads)
    for values, gradient in results[1:]:
        assert values == results[0][0]
        assert torch.equal(gradient, results[0][1])


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), classes=st.integers(1, 24), scale=st.floats(0, 200), seed=st.integers(0, 1000))
def test_entropies_obey_their_bounds(rows, classes, scale, seed):
    logits = random_logits(rows, classes, torch.float32, scale, seed)
    conditional, marginal = softmax_entropy(logits)
    assert -1e-6 <= conditional <= marginal + 1e-5
    assert marginal <= math.log(classes) + 1e-5


@needs_kernels
@pytest.mark.parametrize("isa", _extension.build_info()["cpu_isas_available"])
def test_every_instruction_set_agrees_with_pytorch(isa):
    program = """
import torch
from fastgan.ops import softmax_entropy_cross_entropy as fused
from fastgan.ops.softmax_entropy import softmax_entropy_cross_entropy_reference as reference
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float64, 1e-12)):
    logits, labels = (4 * torch.randn(77, 10)).to(dtype).requires_grad_(), torch.randint(10, (77,))
    exact = logits.detach().double().requires_grad_()
    ours, theirs = fused(logits, labels), reference(exact, labels)
    for a, b in zip(ours, theirs):
        assert abs(a.item() - b.item()) < 3e-6, (dtype, a, b)
    gradient, = torch.autograd.grad(ours[0] - 2 * ours[1] + ours[2], logits)
    expected, = torch.autograd.grad(theirs[0] - 2 * theirs[1] + theirs[2], exact)
    assert (gradient.double() - expected).abs().max() <= tolerance * expected.abs().max(), dtype
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "FASTGAN_CPU_ISA": isa})


@needs_kernels
def test_the_compiled_operator_refuses_forward_mode_derivatives_by_name():
    with torch.autograd.forward_ad.dual_level():
        logits = torch.autograd.forward_ad.make_dual(torch.randn(4, 3), torch.randn(4, 3))
        with pytest.raises(NotImplementedError, match="softmax_entropy: logits must carry no forward-mode derivative"):
            torch.ops.fastgan.softmax_entropy(logits)


def test_a_graph_can_be_kept_but_not_used_twice_otherwise():
    logits = random_logits(5, 3).requires_grad_()
    conditional, _ = softmax_entropy(logits)
    first = torch.autograd.grad(conditional, logits, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(conditional, logits)[0], first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(conditional, logits)


def test_logits_changed_after_forward_are_noticed():
    logits = random_logits(5, 3).requires_grad_()
    scaled = 2 * logits
    conditional, _ = softmax_entropy(scaled)
    scaled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        conditional.backward()
