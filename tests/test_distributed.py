"""Real processes: two of gloo, and runs started by torchrun."""

import copy
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from run_files import metrics
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan import fuse, ops
from fastgan.data import Batches, ClassBatches, DataError, ImageDataset, load_dataset
from fastgan.losses import feature_matching_loss
from fastgan.nn import ConvBNAct2d, convert_sync_batch_norm
from fastgan.nn.sync_batch_norm import own_statistics
from fastgan.ops.conv2d_bn_act import conv2d_bn_act_reference
from fastgan.train import CatGANConfig, DCGANConfig, GANConfig, Trainer, TrainingError
from fastgan.train.checkpoint import load_checkpoint
from fastgan.train.distributed import Ranks

EXAMPLES = Path(__file__).parent.parent / "examples"
COMMON = dict(dataset="digits", device="cpu", threads=1, latent_dim=8, log_every=1, ema=0.9, epochs=1)
DCGAN = dict(COMMON, image_size=16, batch_size=16, base_channels=16)
CATGAN = dict(COMMON, image_size=16, batch_size=16, base_channels=16, labels="all", augment=False, views=1,
              input_noise=0.0, hidden_noise=0.0)
GAN = dict(COMMON, image_size=12, batch_size=4, hidden_features=8)


def images():
    dataset = load_dataset("digits", image_size=16)
    return ImageDataset(dataset.name, dataset.images[:320], dataset.labels[:320])


def small_images():
    dataset = load_dataset("digits", image_size=12)
    return ImageDataset(dataset.name, dataset.images[:320], dataset.labels[:320])


def trained(config, dataset, checkpoint=None):
    trainer = Trainer(config, dataset, checkpoint)
    trainer.train()
    return trainer


def weights(trainer):
    return {f"{name}.{key}": value.clone() for name, network in trainer.networks.items()
            for key, value in network.state_dict().items()}


# --- what two processes do, each case in both; the results of each case and process are compared below


def _gan(rank, folder):
    return weights(trained(GANConfig(**GAN, max_steps=4, output=str(folder)), small_images()))


def _dcgan(rank, folder):
    return weights(trained(DCGANConfig(**DCGAN, max_steps=4, output=str(folder)), images()))


def _resumed(rank, folder):
    for steps, checkpoint in ((2, None), (4, folder / "checkpoint.pt")):
        state = None if checkpoint is None else load_checkpoint(checkpoint, "dcgan")
        config = DCGANConfig(**DCGAN, max_steps=steps, output=str(folder), resume=None if state is None else str(folder))
        trainer = trained(config, images(), state)
    return weights(trainer)


def _resumed_from_one_process(rank, folder):
    folder = folder.parent / "alone"
    config = GANConfig(**GAN, max_steps=4, output=str(folder.parent / "from_alone"), resume=str(folder))
    return weights(trained(config, small_images(), load_checkpoint(folder / "checkpoint.pt", "gan")))


def _nan_in_process_1(rank, folder):
    trainer = Trainer(DCGANConfig(**DCGAN, output=str(folder)), images())
    step = trainer.train_step

    def poisoned(batch):
        if rank == 1 and trainer.step == 2:
            batch.images[0] = float("nan")
        return step(batch)

    trainer.train_step = poisoned
    with pytest.raises(TrainingError) as error:
        trainer.train()
    return str(error.value)


def _signal_to_process_1(rank, folder):
    trainer = Trainer(DCGANConfig(**DCGAN, output=str(folder)), images())
    step = trainer.train_step

    def interrupted(batch):
        if rank == 1 and trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(batch)

    trainer.train_step = interrupted
    with pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
        trainer.train()
    return trainer.step, ended.type.__name__


def _settings_that_differ(rank, folder):
    with pytest.raises(TrainingError) as error:
        Trainer(DCGANConfig(**{**DCGAN, "learning_rate": 0.1 + rank}, output=str(folder)), images())
    return str(error.value)


def _output_that_cannot_be_written(rank, folder):
    folder.write_text("a file")
    with pytest.raises(TrainingError) as error:
        Trainer(DCGANConfig(**DCGAN, output=str(folder)), images())
    return str(error.value)


def _own_random_numbers(rank, folder):
    ranks, cpu = Ranks(), torch.device("cpu")
    torch.manual_seed(3)
    return [(ranks.draw(lambda: torch.randn(4), cpu), torch.randn(4 + rank)[:4]) for _ in range(3)]


def _figures_and_gradients(rank, folder):
    ranks = Ranks()
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    parameter.grad = torch.full((2, 3), 1.0 + rank).t().contiguous().t()
    loss, stop = ranks.average([parameter, torch.nn.Parameter(torch.zeros(1))], torch.tensor(10.0 * rank), rank == 1)
    return parameter.grad, loss, stop, ranks.mean({"a": torch.tensor(rank + 1.0), "b": 2.0 * rank})


def _dcgan_global(rank, folder):
    return weights(trained(DCGANConfig(**DCGAN, sync_batch_norm=True, max_steps=4, output=str(folder)), images()))


def _catgan_global(rank, folder):
    return weights(trained(CatGANConfig(**CATGAN, sync_batch_norm=True, max_steps=2, output=str(folder)), images()))


def _feature_matching(rank, folder):
    generator = torch.Generator().manual_seed(7)
    real, fake = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
    share, group = slice(4 * rank, 4 * rank + 4), distributed.group.WORLD
    whole = fake.clone().requires_grad_()
    own = fake[share].clone().requires_grad_()
    expected = feature_matching_loss(real, whole)
    loss = feature_matching_loss(real[share], own, process_group=group)
    expected.backward(), loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(own.grad / 2, whole.grad[share])
    return loss.item()


# A layer, and how many of the 8 images process 0 holds.
LAYERS = {
    "minimal filtering": (dict(channels=(16, 32), kernel=4, stride=2, padding=1), 3),
    "minimal filtering, transposed": (dict(channels=(32, 16), kernel=4, stride=2, padding=1, transposed=True), 5),
    "contiguous": (dict(channels=(3, 5), kernel=3, stride=1, padding=1), 3),
    "float64": (dict(channels=(3, 5), kernel=3, stride=2, padding=0, dtype=torch.float64), 1),
    "no images in process 0": (dict(channels=(3, 5), kernel=3, stride=1, padding=1), 0),
    "reference": (dict(channels=(3, 5), kernel=3, stride=1, padding=1, reference=True), 6),
    "reference, no images in process 0": (dict(channels=(3, 5), kernel=3, stride=1, padding=1, reference=True), 0),
}


def _layer(channels, kernel, stride, padding, transposed=False, dtype=torch.float32, reference=False):
    """(operator, [input, weight, gamma, beta], its other arguments)"""
    generator = torch.Generator().manual_seed(5)
    random = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    c_in, c_out = channels
    # A mean far from 0: E[x^2] - E[x]^2 would lose the variance.
    input = random(8, c_in, 8, 8) + 20
    if channels[0] >= 16:
        input = input.contiguous(memory_format=torch.channels_last)
    weight = random(*((c_in, c_out) if transposed else (c_out, c_in)), kernel, kernel) / kernel
    operator = conv2d_bn_act_reference if reference else ops.conv_transpose2d_bn_act if transposed else ops.conv2d_bn_act
    return operator, [input, weight, random(c_out), random(c_out)], dict(stride=stride, padding=padding)


def _run_layer(operator, tensors, arguments, rows, **group):
    """Output, running statistics and gradients of a layer over some rows of its input."""
    input, *parameters = (tensor.clone().requires_grad_() for tensor in [tensors[0][rows], *tensors[1:]])
    weight, gamma, beta = parameters
    running = [torch.zeros_like(gamma.detach()), torch.ones_like(gamma.detach())]
    output = operator(input, weight, None, gamma, beta, *running, activation="leaky_relu", **arguments, **group)
    factors = torch.arange(8, dtype=output.dtype)[rows].view(-1, 1, 1, 1) - 2
    (output.square() * factors).sum().backward()
    return {"output": output.detach(), "running_mean": running[0], "running_var": running[1], "input": input.grad,
            "weight": weight.grad, "gamma": gamma.grad, "beta": beta.grad}


def _operators(rank, folder):
    results = {}
    for name, (description, first) in LAYERS.items():
        layer, rows = _layer(**description), slice(0, first) if rank == 0 else slice(first, 8)
        results[name] = _run_layer(*layer, rows, process_group=distributed.group.WORLD)
    return results


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.__name__)
        return function(*arguments, **(keywords or {}))


def _network():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32),
        nn.LeakyReLU(0.2), nn.Conv2d(32, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 4, 2, 1, 0), nn.Flatten(), nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 1),
    )  # fmt: skip


def _two_batches():
    generator = torch.Generator().manual_seed(4)
    return torch.randn(8, 1, 16, 16, generator=generator), torch.randn(8, 1, 16, 16, generator=generator) + 1


def _state(network):
    gradients = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    return gradients | {name: buffer.clone() for name, buffer in network.named_buffers()}


def _two_forwards(network, share=slice(None)):
    real, fake = _two_batches()
    (F.softplus(-network(real[share])).mean() + F.softplus(network(fake[share])).mean()).backward()


def _fused_in_distributed_data_parallel(rank, folder):
    network = fuse(convert_sync_batch_norm(_network()), inplace=True)
    with Recorder() as recorder:
        _two_forwards(DistributedDataParallel(network), slice(4 * rank, 4 * rank + 4))
    return _state(network), recorder.names.count("conv_stack_forward.default")


def _fused_by_pytorchs_conversion(rank, folder):
    network = nn.SyncBatchNorm.convert_sync_batchnorm(_network()[:9])
    fuse(network, inplace=True)
    network(_two_batches()[0][slice(0, 3) if rank == 0 else slice(3, 8)]).sum().backward()
    return dict(network.named_buffers())


def _statistics_of_its_own(rank, folder):
    module = convert_sync_batch_norm(ConvBNAct2d(2, 3, 3))
    x = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(rank))
    plain = copy.deepcopy(module)
    plain.bn.__class__ = nn.BatchNorm2d
    same_in_evaluation = torch.equal(module.eval()(x), plain.eval()(x))
    module.train(), plain.train()
    with own_statistics():
        same_by_itself = torch.equal(module(x), plain(x))
    return same_in_evaluation, same_by_itself, torch.allclose(module(x), plain(x))


def _second_derivative(rank, folder):
    messages = []
    for kernel in (4, 3):  # by conv_stack, by the operator
        network = fuse(convert_sync_batch_norm(nn.Sequential(nn.Conv2d(1, 16, kernel, 2, 1), nn.BatchNorm2d(16))))
        x = torch.randn(2, 1, 8, 8, requires_grad=True)
        with pytest.raises(NotImplementedError) as error:
            torch.autograd.grad(network(x).sum(), x, create_graph=True)
        messages.append(str(error.value))
    return messages


def _one_value(rank, folder):
    bn = [torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3)]
    rows = torch.randn(1 - rank, 2, 3, 3)
    with pytest.raises(ValueError, match="got one in all processes"):
        ops.conv2d_bn_act(rows, torch.ones(3, 2, 3, 3), None, *bn, process_group=distributed.group.WORLD)
    assert torch.equal(bn[2], torch.zeros(3))
    # One in each is enough.
    one_each = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(rank))
    return ops.conv2d_bn_act(one_each, torch.ones(3, 2, 3, 3), None, *bn, process_group=distributed.group.WORLD)


CASES = [
    _operators, _fused_in_distributed_data_parallel, _fused_by_pytorchs_conversion, _statistics_of_its_own,
    _feature_matching, _second_derivative, _one_value, _dcgan_global, _catgan_global,
    _gan, _dcgan, _resumed, _resumed_from_one_process, _nan_in_process_1, _signal_to_process_1, _settings_that_differ,
    _output_that_cannot_be_written, _own_random_numbers, _figures_and_gradients,
]


def _process(rank, folder, queue):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting_point'}", rank=rank, world_size=2)
    for case in CASES:
        try:
            result = case(rank, folder / case.__name__)
        except BaseException:
            queue.put((rank, case.__name__, "failed", traceback.format_exc()))
            raise
        torch.save(result, folder / f"{case.__name__}.{rank}.pt")
    queue.put((rank, None, "done", None))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The result of a case in process 0 and in process 1."""
    folder = tmp_path_factory.mktemp("two")
    trained(GANConfig(**GAN, max_steps=2, output=str(folder / "alone")), small_images())
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_process, args=(rank, folder, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            rank, case, outcome, details = queue.get(timeout=200)
            assert outcome == "done", f"{case} in process {rank}:\n{details}"
    finally:
        for process in processes:
            process.terminate() if process.is_alive() and sys.exc_info()[0] else process.join()
    results = lambda case: [torch.load(folder / f"{case.__name__}.{rank}.pt") for rank in range(2)]  # noqa: E731
    results.folder = folder
    return results


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)


def test_two_processes_follow_the_trajectory_of_one(both, tmp_path):
    # Without batch norm, so with nothing that a process computes from its own images only.
    alone = trained(GANConfig(**GAN, max_steps=4, output=str(tmp_path)), small_images())
    for result in both(_gan):
        assert_same(result, weights(alone), rtol=1e-4, atol=1e-5)
    for together, by_itself in zip(metrics(both.folder / "_gan"), metrics(tmp_path), strict=True):
        for name in ("step", "loss_d", "loss_g", "d_real", "d_fake"):
            assert together[name] == pytest.approx(by_itself[name], rel=1e-5)


def test_both_processes_hold_the_same_weights_bit_for_bit(both):
    zero, one = both(_dcgan)
    learned = [name for name in zero if "running" not in name]
    assert len(learned) > 8
    assert [name for name in learned if not torch.equal(zero[name], one[name])] == []


def test_resume_with_the_same_number_of_processes_is_bit_exact(both):
    whole, resumed = both(_dcgan), both(_resumed)
    # The running statistics of process 0 are the run's; process 1 took them over at the resume.
    assert_same(whole[0], resumed[0], rtol=0, atol=0)
    assert load_checkpoint(both.folder / "_resumed" / "checkpoint.pt", "dcgan")["step"] == 4


def test_resume_with_another_number_of_processes_goes_on_with_the_same_images_and_noise(both, tmp_path):
    alone = trained(GANConfig(**GAN, max_steps=4, output=str(tmp_path / "run")), small_images())
    for result in both(_resumed_from_one_process):
        assert_same(result, weights(alone), rtol=1e-4, atol=1e-5)
    # And from two processes to one.
    folder = both.folder / "_gan"
    config = dict(GAN, max_steps=6, output=str(tmp_path / "one"), resume=str(folder))
    one = trained(GANConfig(**config), small_images(), load_checkpoint(folder / "checkpoint.pt", "gan"))
    alone = trained(GANConfig(**GAN, max_steps=6, output=str(tmp_path / "six")), small_images())
    assert_same(weights(one), weights(alone), rtol=1e-4, atol=1e-5)


def test_results_are_written_once(both):
    assert sorted(path.name for path in (both.folder / "_gan").iterdir()) == [
        "alarms.jsonl", "checkpoint.pt", "config.json", "losses.png", "metrics.jsonl", "samples", "samples.gif",
    ]
    assert [record["step"] for record in metrics(both.folder / "_gan")] == [1, 2, 3, 4]


def test_a_nan_in_one_process_stops_all_and_names_it(both):
    for message in both(_nan_in_process_1):
        assert message.startswith("step 3: the loss of the discriminator is nan in process 1;")
        assert "the training images" in message
    assert load_checkpoint(both.folder / "_nan_in_process_1" / "checkpoint.pt", "dcgan")["step"] == 0


def test_a_signal_to_one_process_stops_all_at_the_same_step_with_a_checkpoint(both):
    assert both(_signal_to_process_1) == [(3, "SystemExit"), (3, "KeyboardInterrupt")]
    assert load_checkpoint(both.folder / "_signal_to_process_1" / "checkpoint.pt", "dcgan")["step"] == 3


def test_settings_that_differ_are_refused_by_name(both):
    for message in both(_settings_that_differ):
        assert "all processes of a run must have the same --learning-rate" in message
        assert "has 0.1" in message and "has 1.1" in message


def test_an_output_that_cannot_be_written_ends_all_processes(both):
    for message in both(_output_that_cannot_be_written):
        assert "cannot be written to" in message


def test_shared_random_numbers_are_those_of_one_process_and_a_processes_own_are_not(both):
    torch.manual_seed(3)
    alone = [torch.randn(4) for _ in range(3)]
    zero, one = both(_own_random_numbers)
    for expected, (shared, own), (shared_1, own_1) in zip(alone, zero, one):
        assert torch.equal(shared, expected) and torch.equal(shared_1, expected)
        assert not torch.isclose(own, own_1).any()


def test_gradients_figures_loss_and_stop_are_combined(both):
    for gradient, loss, stop, figures in both(_figures_and_gradients):
        assert torch.equal(gradient, torch.full((2, 3), 1.5))
        assert float(loss) == 5 and stop is True
        assert figures == {"a": 1.5, "b": 1.0}


# --- batch norm over the processes


# Adam's first steps turn the rounding of a gradient near 0 into a whole step, which the CatGAN amplifies: bounds for the
# relative difference of all weights together, where each process's own statistics give 8e-3 and 2e-2.
@pytest.mark.parametrize("family, bound", [("dcgan", 1e-5), ("catgan", 1e-3)])
def test_two_halves_with_global_statistics_follow_the_trajectory_of_the_whole_batch(both, tmp_path, family, bound):
    case, config = {"dcgan": (_dcgan_global, DCGANConfig(**DCGAN, max_steps=4, output=str(tmp_path))),
                    "catgan": (_catgan_global, CatGANConfig(**CATGAN, max_steps=2, output=str(tmp_path)))}[family]
    expected = weights(trained(config, images()))
    for result in both(case):
        learned = [name for name in expected if "running" not in name and "num_batches" not in name]
        found, whole = (torch.cat([state[name].flatten() for name in learned]) for state in (result, expected))
        assert (found - whole).norm() < bound * whole.norm()
    names = {"dcgan": ("d_real", "d_fake"), "catgan": ("entropy_real", "entropy_marginal", "cross_entropy")}[family]
    records = list(zip(metrics(both.folder / case.__name__), metrics(tmp_path), strict=True))
    for together, by_itself in records:
        for name in ("step", "loss_d", "loss_g", *names):
            tolerance = 1e-5 if together is records[0][0] else 100 * bound
            assert together[name] == pytest.approx(by_itself[name], rel=tolerance, abs=1e-5), name


@pytest.mark.parametrize("name", LAYERS)
def test_operators_with_a_process_group_equal_the_whole_batch(both, name):
    whole = _run_layer(*_layer(**LAYERS[name][0]), slice(None))
    zero, one = (result[name] for result in both(_operators))
    tolerance = dict(rtol=1e-9, atol=1e-9) if whole["output"].dtype == torch.float64 else dict(rtol=2e-4, atol=2e-3)
    for key in ("output", "input"):
        torch.testing.assert_close(torch.cat([zero[key], one[key]]), whole[key], **tolerance)
    for key in ("running_mean", "running_var"):
        assert torch.equal(zero[key], one[key])
        torch.testing.assert_close(zero[key], whole[key], rtol=1e-5, atol=1e-6)
    for key in ("weight", "gamma", "beta"):
        torch.testing.assert_close(zero[key] + one[key], whole[key], rtol=tolerance["rtol"], atol=10 * tolerance["atol"])


def test_two_forwards_before_backward_in_distributed_data_parallel(both):
    alone = fuse(_network())
    _two_forwards(alone)
    for state, stacks in both(_fused_in_distributed_data_parallel):
        assert_same(state, _state(alone), rtol=1e-4, atol=1e-6)
        assert stacks == 2  # the fast way, once for each forward


def test_fuse_takes_the_layers_that_pytorch_converts(both):
    alone = fuse(_network()[:9])
    alone(_two_batches()[0])
    for buffers in both(_fused_by_pytorchs_conversion):
        assert_same(buffers, dict(alone.named_buffers()), rtol=1e-5, atol=1e-6)


def test_converted_layers_synchronise_in_training_only(both):
    assert both(_statistics_of_its_own) == [(True, True, False)] * 2


def test_converted_layers_are_plain_batch_norm_without_other_processes():
    plain = _network()
    for converted in (convert_sync_batch_norm(copy.deepcopy(plain)), fuse(convert_sync_batch_norm(copy.deepcopy(plain)))):
        x = _two_batches()[0]
        torch.testing.assert_close(converted(x), copy.deepcopy(plain)(x))
        assert int(converted[11].num_batches_tracked) == 1


def test_second_derivatives_over_processes_are_refused_by_name(both):
    for messages in both(_second_derivative):
        assert messages[0].startswith("conv_stack: no second derivatives") and "process_group" in messages[0]
        assert messages[1].startswith("conv2d_bn_act: no second derivatives")


def test_one_value_in_all_processes_is_refused_and_one_in_each_is_not(both):
    zero, one = both(_one_value)
    torch.testing.assert_close(zero.abs().max() + one.abs().max(), torch.tensor(1.2), rtol=1e-3, atol=0)


def test_feature_matching_over_processes_is_that_of_the_whole_batch(both):
    assert both(_feature_matching)[0] > 0  # compared in the processes


# --- shares of a batch


def share_of(rank, size):
    ranks = Ranks()
    ranks.rank, ranks.size = rank, size
    return ranks.share


def dataset_of(count, labels=None):
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    return ImageDataset("numbers", pixels, labels)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_shares_of_a_batch_are_the_batch(processes):
    labels = torch.arange(40) % 2
    for make, parts in (
        (lambda: Batches(dataset_of(40, labels), 8, seed=1), 1),
        (lambda: ClassBatches(dataset_of(40, labels), 4, 1, (0, 1)), 2),
    ):
        whole, divided = make(), [make() for _ in range(processes)]
        assert whole.parts == parts
        for rank, batches in enumerate(divided):
            batches.divide(processes, lambda rows, share=share_of(rank, processes): share(rows, parts))
        for batch, *shares in zip(whole.epoch(3, 1), *(batches.epoch(3, 1) for batches in divided), strict=True):
            assert [len(share.images) for share in shares] == [8 // processes] * processes
            together = torch.cat([torch.stack(part.images.chunk(parts)) for part in shares], 1).flatten(0, 1)
            assert torch.equal(together, batch.images)
            together = torch.cat([torch.stack(part.labels.chunk(parts)) for part in shares], 1).flatten(0, 1)
            assert torch.equal(together, batch.labels)


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(DataError, match="batch_size must be divisible by the number of processes, 3, got 8"):
        Batches(dataset_of(40), 8, seed=1).divide(3, lambda rows: rows)
    with pytest.raises(DataError, match="batch_size must be divisible by the number of processes, 2, got 5"):
        Batches(dataset_of(40), 10, seed=1, parts=2).divide(2, lambda rows: rows)
    with pytest.raises(DataError, match="batch_size must be divisible by the number of processes, 2, got 5"):
        ClassBatches(dataset_of(40, torch.arange(40) % 2), 5, 1, (0, 1)).divide(2, lambda rows: rows)


# --- torchrun


def torchrun(script, arguments, timeout=120):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_an_example_trains_under_torchrun(tmp_path):
    flags = ["--device", "cpu", "--image-size", "16", "--base-channels", "16", "--batch-size", "16", "--log-every", "1"]
    done = torchrun(EXAMPLES / "train_dcgan.py", [*flags, "--max-steps", "2", "--output", tmp_path / "run"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results in") == 1
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2]


def test_a_process_that_fails_ends_the_run_with_its_error(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from fastgan.train import DCGANConfig, Trainer, run\n"
        "step = Trainer.train_step\n"
        "def broken(self, batch):\n"
        "    if os.environ['RANK'] == '1' and self.step == 1:\n"
        "        raise ZeroDivisionError('broken on purpose')\n"
        "    return step(self, batch)\n"
        "Trainer.train_step = broken\n"
        "sys.exit(run(DCGANConfig))\n"
    )
    flags = ["--device", "cpu", "--image-size", "16", "--base-channels", "16", "--batch-size", "16"]
    done = torchrun(script, [*flags, "--output", tmp_path / "run"])
    assert done.returncode != 0
    assert "ZeroDivisionError: broken on purpose" in done.stderr
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt", "dcgan")["step"] == 0
