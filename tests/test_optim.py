"""fastgan.optim.Adam is torch.optim.Adam in every respect but the kernel of its step."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastgan import _extension, optim

needs_kernel = pytest.mark.skipif(
    not (torch.cuda.is_available() and _extension.has_kernels("cuda")), reason="no CUDA device, or no CUDA kernels"
)

SETTINGS = [
    {},
    {"fused": True, "betas": (0.5, 0.999), "lr": 2e-4},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "eps": 1e-3},
    {"amsgrad": True},
    {"maximize": True, "weight_decay": 0.1},
    {"foreach": True},
]


def parameters(device="cpu"):
    """Weights of a DCGAN's layers, one in channels_last, sizes that are no multiples of 4, a scalar and an empty tensor."""
    random = torch.Generator().manual_seed(0)
    shapes = (16, 3, 4, 4), (8, 1, 4, 4), (33, 5), (1023,), (16,), (), (0, 3)
    made = [torch.randn(shape, generator=random) for shape in shapes]
    made[0] = made[0].contiguous(memory_format=torch.channels_last)
    return [tensor.to(device).requires_grad_() for tensor in made]


def gradients(tensors, number):
    random = torch.Generator().manual_seed(number)
    return [torch.empty_like(p).copy_(torch.randn(p.shape, generator=random)) for p in tensors]


def set_gradients(tensors, values):
    for parameter, gradient in zip(tensors, values):
        parameter.grad = gradient


def check_that_operator_names_the_argument_at_fault(device):
    place = torch.empty(0, device=device).device

    def call(**changes):
        tensors = {name: [torch.ones(2, 3)] for name in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs")}
        arguments = tensors | {"steps": [torch.zeros(())], "blocks_arrived": torch.zeros(1, dtype=torch.int32)} | changes
        numbers = dict(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled_weight_decay=False)
        torch.ops.fastgan.adam_(**numbers, **arguments)

    with torch.device(device):
        call()
        for name, value, message in (
            ("gradients", [], "gradients must be as many as parameters, 1, got 0"),
            ("parameters", [torch.ones(2, 3).double()], f"parameters must be float32 on {place}, got Double on {place}"),
            ("parameters", [torch.ones(2, 6)[:, ::2]], r"parameters must be dense in memory, got shape \[2, 3\] with"),
            ("exp_avgs", [torch.ones(3, 2).t()], "exp_avgs must have the shape and strides of its parameter"),
            ("exp_avg_sqs", [torch.ones(2, 3).half()], "exp_avg_sqs must be float32"),
            ("steps", [torch.ones(2)], r"steps must have one element, got shape \[2\]"),
            ("blocks_arrived", torch.zeros(1), f"blocks_arrived must be one int32 on {place}"),
            ("found_inf", torch.zeros(2), "found_inf must have one element"),
            ("lr_on_device", torch.zeros((), dtype=torch.float64), f"lr_on_device must be float32 on {place}, got Double"),
        ):
            with pytest.raises(RuntimeError, match=f"adam_: {message}"):
                call(**{name: value})


def steps_of(optimizer, tensors, count, first=0):
    """Steps with the gradients of these numbers."""
    for number in range(first, first + count):
        set_gradients(tensors, gradients(tensors, number))
        optimizer.step()


def assert_close(ours, theirs, tolerance=1e-6):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def assert_same_states(one, other, tolerance=1e-6):
    assert one.keys() == other.keys()
    for index in one:
        assert one[index].keys() == other[index].keys()
        for name in one[index]:
            assert_close([one[index][name].cpu()], [other[index][name].cpu()], tolerance)


# ---- on the CPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pytorchs(monkeypatch):
    """The parameter groups that PyTorch stepped for our optimizer."""
    groups, step = [], optim._torch_step

    def watched(optimizer, closure=None):
        groups.extend(optimizer.param_groups)
        return step(optimizer, closure)

    monkeypatch.setattr(optim, "_torch_step", watched)
    return groups


OTHERS = {"amsgrad", "maximize", "foreach"}  # settings whose steps are PyTorch's


@pytest.mark.parametrize("settings", SETTINGS)
def test_same_numbers_as_pytorchs(settings, pytorchs):
    ours, theirs = parameters(), parameters()
    own, other = optim.Adam(ours, **settings), torch.optim.Adam(theirs, **settings)
    assert own.defaults == other.defaults
    steps_of(own, ours, 20)
    steps_of(other, theirs, 20)
    in_kernel = _extension.has_kernels("cpu") and not OTHERS & settings.keys()
    assert len(pytorchs) == (0 if in_kernel else 20)
    tolerance = 1e-6 if in_kernel else 0
    assert_close(ours, theirs, tolerance)
    assert_same_states(own.state_dict()["state"], other.state_dict()["state"], tolerance)


@pytest.mark.parametrize("size", [5, 2**14, 2**14 + 1, 100_003])
def test_every_element_is_stepped_once_at_any_number_of_threads(size):
    results = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            tensors = [torch.zeros(size), torch.zeros(7)]
            own = optim.Adam(tensors, lr=0.1)
            for number in range(2):
                set_gradients(tensors, [torch.linspace(1, 2, t.numel()) for t in tensors])
                own.step()
        finally:
            torch.set_num_threads(before)
        results.append(tensors)
        # With the same gradient at every step, each is as large as the learning rate.
        assert_close(tensors, [torch.full_like(t, -0.2) for t in tensors], 1e-5)
    assert all(map(torch.equal, *results))


@pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="the compiled extension is missing")
def test_other_steps_are_pytorchs(pytorchs):
    doubles = [p.detach().double().requires_grad_() for p in parameters()]
    steps_of(optim.Adam(doubles), doubles, 1)

    strided = parameters()
    own = optim.Adam(strided)
    set_gradients(strided, gradients(strided, 0))
    strided[0].grad = strided[0].grad.contiguous()
    own.step()

    mixed = [torch.ones(3), torch.ones(3, device="meta")]
    own = optim.Adam(mixed)
    set_gradients(mixed, [torch.ones(3), torch.ones(3, device="meta")])
    own.step()
    assert (mixed[0] < 1).all()

    scaled = parameters()
    own = optim.Adam(scaled, fused=True)
    own.grad_scale, own.found_inf = torch.full((), 2.0), torch.zeros(())
    steps_of(own, scaled, 1)
    assert len(pytorchs) == 4


def test_capturable_raises_as_pytorchs():
    for optimizer in (optim.Adam, torch.optim.Adam):
        tensors = parameters()
        with pytest.raises((AssertionError, RuntimeError), match="capturable"):
            steps_of(optimizer(tensors, capturable=True), tensors, 1)


def test_found_inf_leaves_out_the_step(pytorchs):
    ours, theirs = parameters(), parameters()
    own, other = optim.Adam(ours, fused=True), torch.optim.Adam(theirs, fused=True)
    for number in range(4):
        for optimizer, tensors in ((own, ours), (other, theirs)):
            optimizer.found_inf = torch.tensor(float(number % 2))
            steps_of(optimizer, tensors, 1, first=number)
    assert_close(ours, theirs)
    assert own.state[ours[0]]["step"] == 2
    assert len(pytorchs) == (0 if _extension.has_kernels("cpu") else 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_learning_rate_in_a_tensor(pytorchs, dtype):
    ours, theirs = parameters(), parameters()
    own, other = (optim.Adam(ours, lr=torch.tensor(0.1, dtype=dtype)),
                  torch.optim.Adam(theirs, lr=torch.tensor(0.1, dtype=dtype), fused=True))
    for rate in (0.1, 0.02):
        for optimizer, tensors in ((own, ours), (other, theirs)):
            optimizer.param_groups[0]["lr"].fill_(rate)
            steps_of(optimizer, tensors, 2)
    assert_close(ours, theirs)
    assert len(pytorchs) == (0 if _extension.has_kernels("cpu") else 4)


@pytest.mark.skipif(not _extension.has_kernels("cpu"), reason="the compiled extension is missing")
def test_operator_changes_nothing_that_it_does_not_take():
    numbers = dict(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled_weight_decay=False)

    def call(**changes):
        lists = {name: [torch.ones(2, 3), torch.ones(2)] for name in ("parameters", "gradients", "exp_avgs", "exp_avg_sqs")}
        lists["steps"] = [torch.zeros(()), torch.zeros(())]
        given = {name: changes.pop(name) for name in ("lr_tensor", "found_inf") if name in changes}
        for name, tensor in changes.items():
            lists[name][1] = tensor
        before = [tensor.clone() for tensors in lists.values() for tensor in tensors]
        taken = torch.ops.fastgan.adam_group_(**lists, **numbers, **given)
        unchanged = all(map(torch.equal, before, [tensor for tensors in lists.values() for tensor in tensors]))
        return taken, unchanged

    assert call() == (True, False)
    for name, tensor in (
        ("parameters", torch.ones(2).double()), ("parameters", torch.ones(4)[::2]), ("gradients", torch.ones(3)),
        ("gradients", torch.ones(2, dtype=torch.bfloat16)), ("exp_avgs", torch.ones(4)[::2]),
        ("exp_avg_sqs", torch.ones(2, 1)), ("steps", torch.zeros(2)), ("steps", torch.zeros((), dtype=torch.float64)),
        ("lr_tensor", torch.ones(2)), ("lr_tensor", torch.tensor(1)), ("found_inf", torch.zeros(0)),
    ):  # fmt: skip
        assert call(**{name: tensor}) == (False, True)
    assert call(found_inf=torch.tensor(float("nan"))) == (True, True)
    with pytest.raises(ValueError, match="adam_group_: steps must be as many as parameters, 1, got 0"):
        ones = [torch.ones(2)]
        torch.ops.fastgan.adam_group_(ones, ones, ones, ones, [], **numbers)


def test_backward_finds_out_that_a_parameter_it_saved_was_stepped():
    parameter = torch.ones(3, requires_grad=True)
    loss = (parameter * parameter).sum()
    parameter.grad = torch.ones(3)
    optim.Adam([parameter]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("classes", [(optim.Adam, torch.optim.Adam), (torch.optim.Adam, optim.Adam)])
@pytest.mark.parametrize("settings", [{}, {"fused": True}])
def test_state_goes_to_and_from_pytorchs(classes, settings):
    first, second = classes
    tensors, expected = parameters(), parameters()
    before, after, whole = first(tensors, **settings), second(tensors), torch.optim.Adam(expected, **settings)
    steps_of(before, tensors, 3)
    after.load_state_dict(before.state_dict())
    steps_of(after, tensors, 3, first=3)
    steps_of(whole, expected, 6)
    assert_close(tensors, expected)


def test_hooks_run_once_a_step():
    torch.optim.Adam(parameters())  # has hooks wrapped around PyTorch's step by now
    tensors, calls = parameters(), []
    own = optim.Adam(tensors)
    own.register_step_pre_hook(lambda *_: calls.append("before"))
    own.register_step_post_hook(lambda *_: calls.append("after"))
    steps_of(own, tensors, 2)
    assert calls == ["before", "after"] * 2


def test_scheduler_sets_the_learning_rate(recwarn):
    tensors = parameters()
    own = optim.Adam(tensors, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(own, 0.5)
    for number in range(3):
        before = tensors[3].detach().clone()
        steps_of(own, tensors, 1, first=0)  # the same gradient: steps of the size of the rate
        scheduler.step()
        torch.testing.assert_close((tensors[3] - before).abs(), torch.full_like(before, 0.1 * 0.5**number), rtol=1e-3, atol=1e-5)
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_closure_is_called_once_with_gradients_enabled():
    tensors, losses = parameters(), []

    def closure():
        assert torch.is_grad_enabled()
        own.zero_grad()
        losses.append(sum((p * p).sum() for p in tensors))
        losses[-1].backward()
        return losses[-1]

    own = optim.Adam(tensors)
    with torch.no_grad():
        assert own.step(closure) is losses[0]
    assert len(losses) == 1 and own.state[tensors[0]]["step"] == 1
    assert own.step() is None


def test_parameters_without_gradient_are_left_alone():
    tensors = parameters()
    own = optim.Adam(tensors)
    own.step()
    assert not own.state
    tensors[1].grad = torch.ones_like(tensors[1])
    own.step()
    assert list(own.state) == [tensors[1]]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_copies_go_on_as_the_original(copied):
    tensors = parameters()
    own = optim.Adam(tensors, lr=0.1)
    steps_of(own, tensors, 3)
    other = copied(own)
    others = other.param_groups[0]["params"]
    steps_of(own, tensors, 3)
    steps_of(other, others, 3)
    assert isinstance(other, optim.Adam) and others[0] is not tensors[0]
    assert all(map(torch.equal, tensors, others))


def test_groups_can_be_added():
    ours, theirs = parameters(), parameters()
    for optimizer, tensors in ((optim.Adam(ours[:2]), ours), (torch.optim.Adam(theirs[:2]), theirs)):
        steps_of(optimizer, tensors[:2], 2)
        optimizer.add_param_group({"params": tensors[2:], "lr": 0.3, "betas": (0.1, 0.9)})
        steps_of(optimizer, tensors, 2)
    assert_close(ours, theirs)


def test_step_can_be_differentiated():
    leaf = torch.tensor([1.0, 2.0], requires_grad=True)
    parameter = leaf.clone()
    own = optim.Adam([torch.zeros(2)], differentiable=True)
    own.param_groups[0]["params"] = [parameter]
    parameter.grad = leaf * leaf
    own.step()
    parameter.sum().backward()
    assert leaf.grad is not None


def test_step_can_be_compiled():
    ours, theirs = parameters(), parameters()
    own = optim.Adam(ours)
    set_gradients(ours, gradients(ours, 0))
    torch.compile(own.step, backend="eager")()
    steps_of(torch.optim.Adam(theirs), theirs, 1)
    assert_close(ours, theirs)


@pytest.mark.parametrize("settings", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": -1.0}])
def test_settings_out_of_range_raise(settings):
    with pytest.raises(ValueError, match="Invalid"):
        optim.Adam(parameters(), **settings)


def test_sparse_gradients_raise():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optim.Adam(table.parameters()).step()


# ---- on a GPU ------------------------------------------------------------------------------------------------------


def kernels_of(function):
    """Names of the kernels that it starts."""
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        function()
        torch.cuda.synchronize()
    on_device = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_device if "kernel" in name]


def in_kernel(function):
    return sum("adam_kernel" in name for name in kernels_of(function))


@needs_kernel
@pytest.mark.parametrize("settings", [s for s in SETTINGS if not OTHERS & s.keys()])
def test_same_numbers_as_pytorchs_on_cuda(settings):
    ours, theirs = parameters("cuda"), parameters("cuda")
    own, other = optim.Adam(ours, **settings), torch.optim.Adam(theirs, **settings | {"fused": True})
    steps_of(own, ours, 50)
    steps_of(other, theirs, 50)
    assert_close(ours, theirs)
    assert_same_states(own.state_dict()["state"], other.state_dict()["state"])
    assert in_kernel(own.step) == 1


@needs_kernel
def test_step_on_cuda_is_one_kernel_a_group():
    tensors = parameters("cuda")
    own = optim.Adam([{"params": tensors[:3]}, {"params": tensors[3:], "lr": 0.1}])
    steps_of(own, tensors, 2)
    assert ["adam_kernel" in name for name in kernels_of(own.step)] == [True, True]


@needs_kernel
def test_groups_and_missing_gradients_on_cuda():
    ours, theirs = parameters("cuda"), parameters("cuda")
    for optimizer, tensors in (
        (optim.Adam([{"params": ours[:3]}, {"params": ours[3:], "lr": 0.1}]), ours),
        (torch.optim.Adam([{"params": theirs[:3]}, {"params": theirs[3:], "lr": 0.1}], fused=True), theirs),
    ):
        for number in range(50):
            set_gradients(tensors, gradients(tensors, number))
            tensors[number % len(tensors)].grad = None  # step counts differ from each other
            optimizer.step()
    assert_close(ours, theirs)


@needs_kernel
def test_many_tensors_on_cuda():
    ours, theirs = ([torch.full((i % 7, 3), float(i), device="cuda") for i in range(160)] for _ in range(2))
    own = optim.Adam(ours)
    steps_of(own, ours, 3)
    steps_of(torch.optim.Adam(theirs, fused=True), theirs, 3)
    assert_close(ours, theirs)
    assert in_kernel(own.step) == 3


@needs_kernel
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_learning_rate_in_a_tensor_on_cuda(device):
    ours, theirs = parameters("cuda"), parameters("cuda")
    rates = [torch.tensor(0.1, device=device) for _ in range(2)]
    own, other = optim.Adam(ours, lr=rates[0]), torch.optim.Adam(theirs, lr=rates[1], fused=True)
    for value in (0.1, 0.01, 0.2):
        for rate in rates:
            rate.fill_(value)
        steps_of(own, ours, 2)
        steps_of(other, theirs, 2)
    assert_close(ours, theirs)
    assert in_kernel(own.step) == 1


@needs_kernel
@pytest.mark.parametrize("classes", [(optim.Adam, torch.optim.Adam), (torch.optim.Adam, optim.Adam)])
@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"capturable": True}])
def test_state_goes_to_and_from_pytorchs_on_cuda(classes, settings):
    first, second = classes
    tensors, expected = parameters("cuda"), parameters("cuda")
    before, after, whole = first(tensors, **settings), second(tensors), torch.optim.Adam(expected, **settings)
    steps_of(before, tensors, 3)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    steps_of(after, tensors, 3, first=3)
    steps_of(whole, expected, 6)
    assert_close(tensors, expected, 1e-5)  # not all of them are fused
    assert (in_kernel(after.step) == 1) == (second is optim.Adam)


@needs_kernel
def test_replays_of_a_captured_step_on_cuda_equal_eager_steps():
    ours, eager = parameters("cuda"), parameters("cuda")
    rate = torch.tensor(0.1, device="cuda")
    own, other = optim.Adam(ours, lr=rate, capturable=True), optim.Adam(eager, lr=0.1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        steps_of(own, ours, 3)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        own.step()
    for _ in range(5):
        graph.replay()
    rate.fill_(0.01)
    graph.replay()
    steps_of(own, ours, 2)  # eagerly again

    steps_of(other, eager, 3)
    for _ in range(5):
        other.step()
    other.param_groups[0]["lr"] = 0.01
    other.step()
    steps_of(other, eager, 2)
    assert all(map(torch.equal, ours, eager))
    assert own.state[ours[0]]["step"] == 11


@needs_kernel
def test_capture_on_cuda_needs_capturable():
    tensors = parameters("cuda")
    own = optim.Adam(tensors)
    steps_of(own, tensors, 1)
    with pytest.raises(RuntimeError, match="capturable is False"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        own.step()


@needs_kernel
def test_step_on_cuda_does_not_wait_for_the_device():
    tensors = parameters("cuda")
    own = optim.Adam(tensors)
    steps_of(own, tensors, 1)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        own.step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@needs_kernel
def test_found_inf_on_cuda_leaves_out_the_step():
    ours, theirs = parameters("cuda"), parameters("cuda")
    own, other = optim.Adam(ours, fused=True), torch.optim.Adam(theirs, fused=True)
    for number in range(4):
        for optimizer in (own, other):
            optimizer.found_inf = torch.tensor(float(number % 2), device="cuda")
        steps_of(own, ours, 1, first=number)
        steps_of(other, theirs, 1, first=number)
    assert_close(ours, theirs)
    assert own.state[ours[0]]["step"] == 2
    assert in_kernel(own.step) == 1


@needs_kernel
@pytest.mark.parametrize("settings", [{}, {"fused": True}])
def test_gradient_scaler_on_cuda(settings):
    ours, theirs = parameters("cuda"), parameters("cuda")
    for optimizer, tensors in ((optim.Adam(ours, **settings), ours), (torch.optim.Adam(theirs, **settings), theirs)):
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        for number in range(4):
            optimizer.zero_grad()
            factor = float("inf") if number == 2 else 1.0
            loss = sum((p * g * factor).sum() for p, g in zip(tensors, gradients(tensors, number)))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 512.0
    assert_close(ours, theirs, 1e-5)


@needs_kernel
@pytest.mark.parametrize(
    "dtype, settings",
    [(torch.float32, {"amsgrad": True}), (torch.float32, {"maximize": True}), (torch.float32, {"foreach": True}),
     (torch.float32, {"fused": False}), (torch.float16, {}), (torch.float64, {})],
)  # fmt: skip
def test_other_steps_on_cuda_are_pytorchs(dtype, settings):
    ours, theirs = ([p.detach().to(dtype).requires_grad_() for p in parameters("cuda")] for _ in range(2))
    own = optim.Adam(ours, eps=1e-3, **settings)
    steps_of(own, ours, 5)
    steps_of(torch.optim.Adam(theirs, eps=1e-3, **settings), theirs, 5)
    assert all(map(torch.equal, ours, theirs))
    assert in_kernel(own.step) == 0


@needs_kernel
def test_gradients_in_other_strides_on_cuda_are_pytorchs():
    ours, theirs = parameters("cuda"), parameters("cuda")
    for optimizer, tensors in ((optim.Adam(ours), ours), (torch.optim.Adam(theirs), theirs)):
        steps_of(optimizer, tensors, 2)
        set_gradients(tensors, gradients(tensors, 2))
        tensors[0].grad = tensors[0].grad.contiguous()
        optimizer.step()
    assert_close(ours, theirs, 1e-5)


@needs_kernel
def test_operator_on_cuda_names_the_argument_at_fault():
    check_that_operator_names_the_argument_at_fault("cuda")


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_weight_that_is_not_finite_stays_out_of_the_averages(decoupled):
    found = []
    for optimizer in (torch.optim.Adam, optim.Adam):
        weight = nn.Parameter(torch.tensor([1.0, float("inf"), float("nan")]))
        weight.grad = torch.ones(3)
        own = optimizer([weight], lr=0.1, decoupled_weight_decay=decoupled)
        own.step()
        found.append((weight.detach(), own.state[weight]["exp_avg"], own.state[weight]["exp_avg_sq"]))
    torch.testing.assert_close(found[1], found[0], equal_nan=True)
    assert found[1][1].isfinite().all()
