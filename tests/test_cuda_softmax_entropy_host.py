"""softmax_entropy on CUDA, without a GPU: csrc/ops/cuda_softmax_entropy.cpp and its kernels, compiled for the host
(csrc/cuda/host) as operators for tensors on the CPU, against the operators on the CPU."""

import pytest
import torch
from test_cuda_host import pytestmark  # noqa: F401

LABELS = {"no labels": None, "labels": -100, "ignored labels": 2}


def some_logits(rows, classes, dtype, dense):
    logits = torch.randn(rows, 2 * classes, generator=torch.Generator().manual_seed(rows)).mul(3).to(dtype)
    return logits[:, :classes] if dense else logits[:, ::2]


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows, classes", [(1, 1), (100, 10), (37, 129), (5, 1000)])
def test_operators_equal_those_on_the_cpu(cuda_host, rows, classes, dtype, labels, dense):
    logits, ignored = some_logits(rows, classes, dtype, dense), LABELS[labels]
    given = None if ignored is None else torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
    ignored = -100 if ignored is None else ignored
    found, expected = (
        library.softmax_entropy_forward(logits, given, ignored) for library in (cuda_host, torch.ops.fastgan)
    )
    torch.testing.assert_close(found, expected)
    # Every set of gradients that can come, an absent one counts as 0.
    gradients = [torch.tensor(value, dtype=expected[0].dtype) for value in (0.7, -1.3, 0.4)]
    for present in range(1, 8):
        some = [gradient if present & 1 << i else None for i, gradient in enumerate(gradients)]
        found, wanted = (
            library.softmax_entropy_backward(*some, logits, given, ignored, expected[3], expected[4])
            for library in (cuda_host, torch.ops.fastgan)
        )
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("rows, classes", [(100, 10), (37, 129), (5, 1000)])
def test_nan_and_minus_infinity_go_into_gradients_as_on_the_cpu(cuda_host, rows, classes):
    logits = some_logits(rows, classes, torch.float32, True).contiguous()
    logits[1, 2] = -torch.inf
    for nan in (False, True):
        if nan:
            logits[2, 1] = torch.nan
        saved = torch.ops.fastgan.softmax_entropy_forward(logits, None, -100)[3:]
        found, wanted = (
            library.softmax_entropy_backward(torch.tensor(1e30), None, None, logits, None, -100, *saved) / 1e30
            for library in (cuda_host, torch.ops.fastgan)
        )
        assert found.isnan().sum() == nan * classes and found[1, 2] == 0
        torch.testing.assert_close(found, wanted, equal_nan=True)


def test_a_label_out_of_range_makes_the_cross_entropy_nan(cuda_host):
    for dtype in (torch.float32, torch.float64):
        result = cuda_host.softmax_entropy_forward(torch.zeros(3, 4, dtype=dtype), torch.tensor([0, 4, 1]), -100)
        assert result[2].isnan() and result[0].isfinite() and result[1].isfinite()


def test_wrong_arguments_are_refused_by_name(cuda_host):
    with pytest.raises(RuntimeError, match=r"softmax_entropy: logits must have shape \[N, K\]"):
        cuda_host.softmax_entropy_forward(torch.zeros(3), None, -100)
    with pytest.raises(RuntimeError, match="labels must have shape"):
        cuda_host.softmax_entropy_forward(torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), -100)
