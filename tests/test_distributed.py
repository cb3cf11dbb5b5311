"""Real processes: two of gloo, and runs started by torchrun."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch import distributed

from fastgan.data import Batches, ClassBatches, DataError, ImageDataset, load_dataset
from fastgan.train import DCGANConfig, GANConfig, Trainer, TrainingError
from fastgan.train.checkpoint import load_checkpoint
from fastgan.train.distributed import Ranks

EXAMPLES = Path(__file__).parent.parent / "examples"
COMMON = dict(dataset="digits", device="cpu", threads=1, latent_dim=8, log_every=1, ema=0.9, epochs=1)
DCGAN = dict(COMMON, image_size=16, batch_size=16, base_channels=16)
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


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


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


CASES = [
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
        "checkpoint.pt", "config.json", "losses.png", "metrics.jsonl", "samples", "samples.gif",
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
