"""fastgan.optim.Adam's way through its kernel, without a GPU: csrc/ops/cuda_adam.cpp and the kernel, compiled for the host
(csrc/cuda/host) as an operator for tensors on the CPU, against PyTorch's Adam."""

import copy

import pytest
import torch
from test_cuda_host import load_operators
from test_cuda_host import pytestmark as host_marks
from test_optim import (
    SETTINGS, assert_close, check_that_operator_names_the_argument_at_fault, gradients, parameters, set_gradients, steps_of,
)

from fastgan import _extension, optim

pytestmark = [
    *host_marks,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU tests/test_optim.py runs the kernel itself"),
]

SOURCES = ["csrc/ops/cuda_adam.cpp", "csrc/cuda/adam.cu", "csrc/cuda/host/fibers.cpp"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not _extension.has_kernels("cpu"):
        pytest.skip("needs the compiled extension")
    load_operators(SOURCES, tmp_path_factory.mktemp("cuda_adam"))


@pytest.fixture
def launches(library, monkeypatch):
    """Numbers of tensors of the calls of the kernel, which optimizers take for tensors on the CPU here."""
    counts, adam_ = [], torch.ops.fastgan.adam_

    def counted(parameters, *arguments):
        counts.append(len(parameters))
        adam_(parameters, *arguments)

    monkeypatch.setattr(optim.Adam, "_step_on_cpu", optim.Adam._step_on_cuda)
    monkeypatch.setattr(torch.ops.fastgan, "adam_", counted)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # PyTorch for the CPU has it not
    return counts


@pytest.mark.parametrize("settings", SETTINGS)
def test_same_numbers_as_pytorchs(launches, settings):
    ours, theirs = parameters(), parameters()
    own = optim.Adam(ours, **settings)
    steps_of(own, ours, 20)
    steps_of(torch.optim.Adam(theirs, **settings), theirs, 20)
    assert_close(ours, theirs)
    for_kernel = not any(settings.get(name) for name in ("amsgrad", "maximize", "foreach"))
    assert launches == ([len(ours)] * 20 if for_kernel else [])


def test_many_tensors_take_one_call(launches):
    ours, theirs = ([torch.full((i % 7, 3), float(i)) for i in range(160)] for _ in range(2))
    steps_of(optim.Adam(ours), ours, 3)
    steps_of(torch.optim.Adam(theirs), theirs, 3)
    assert_close(ours, theirs)
    assert launches == [160] * 3


def test_learning_rate_is_read_from_its_tensor(launches):
    ours, theirs = parameters(), parameters()
    rate = torch.tensor(0.1)
    own, other = optim.Adam(ours, lr=rate), torch.optim.Adam(theirs, lr=0.1)
    for value in (0.1, 0.01, 0.2):
        rate.fill_(value)
        other.param_groups[0]["lr"] = value
        steps_of(own, ours, 1)
        steps_of(other, theirs, 1)
    assert_close(ours, theirs)
    assert len(launches) == 3


def test_step_with_found_inf_changes_nothing(launches):
    ours = parameters()
    own = optim.Adam(ours, fused=True)
    steps_of(own, ours, 2)
    state, before = copy.deepcopy(own.state_dict()), [p.detach().clone() for p in ours]
    own.found_inf = torch.tensor(1.0)
    steps_of(own, ours, 1)
    assert all(map(torch.equal, ours, before))
    for one, other in zip(own.state_dict()["state"].values(), state["state"].values(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    own.found_inf = torch.tensor(0.0)
    steps_of(own, ours, 1)
    assert own.state[ours[0]]["step"] == 3 and len(launches) == 4


def test_capture_needs_capturable(launches, monkeypatch):
    ours = parameters()
    own = optim.Adam(ours)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    steps_of(own, ours, 1)  # left to PyTorch, which raises on a GPU
    assert launches == []
    own.param_groups[0]["capturable"] = True
    own.step()
    assert launches == [len(ours)]


def test_other_groups_are_pytorchs(launches):
    def groups():
        first, second, third = (parameters() for _ in range(3))
        return [{"params": first}, {"params": [p.double() for p in second]}, {"params": third, "lr": 0.01, "eps": 1e-3}]

    ours, theirs = groups(), groups()
    for group, other in zip(ours, theirs):
        group["params"] = [p.detach().requires_grad_() for p in group["params"]]
        other["params"] = [p.detach().requires_grad_() for p in other["params"]]
    everything = [[p for group in g for p in group["params"]] for g in (ours, theirs)]
    own = optim.Adam(ours)
    steps_of(own, everything[0], 3)
    steps_of(torch.optim.Adam(theirs), everything[1], 3)
    assert_close(*everything)
    assert launches == [len(parameters())] * 6 and len(own.param_groups) == 3


def test_gradients_in_other_strides_are_pytorchs(launches):
    ours, theirs = parameters(), parameters()
    for own, tensors in ((optim.Adam(ours), ours), (torch.optim.Adam(theirs), theirs)):
        for number in range(3):
            set_gradients(tensors, gradients(tensors, number))
            tensors[0].grad = tensors[0].grad.contiguous()
            own.step()
    assert_close(ours, theirs)
    assert launches == []


def test_strides_of_single_elements_do_not_count(launches):
    parameter = torch.empty(8, 1, 4, 4, memory_format=torch.channels_last).fill_(1.0).requires_grad_()
    parameter.grad = torch.ones(8, 1, 4, 4)
    assert parameter.stride() != parameter.grad.stride()
    optim.Adam([parameter]).step()
    assert launches == [1]


def test_parameters_with_gaps_are_pytorchs(launches):
    ours, theirs = ([torch.ones(6, 8)[:, ::2].requires_grad_()] for _ in range(2))
    steps_of(optim.Adam(ours), ours, 2)
    steps_of(torch.optim.Adam(theirs), theirs, 2)
    assert_close(ours, theirs)
    assert launches == []


def test_backward_notices_that_a_saved_parameter_has_changed(launches):
    parameter = torch.ones(3, requires_grad=True)
    loss = (parameter * parameter).sum()
    parameter.grad = torch.ones(3)
    optim.Adam([parameter]).step()
    assert launches == [1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_operator_names_the_argument_at_fault(library):
    check_that_operator_names_the_argument_at_fault("cpu")
