"""CatGAN: losses, networks, choice of labels, training and its example."""

import copy
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import multiprocessing
from torch.nn import functional as F

import fastgan
from fastgan.data import Batch, normalize
from fastgan.losses import _real_categories_loss, catgan_discriminator_loss, catgan_generator_loss, feature_matching_loss
from fastgan.metrics.clustering import recalibrate_batch_norm
from fastgan.models import catgan
from fastgan.ops import softmax_entropy
from fastgan.train import CatGANConfig, run
from fastgan.train.catgan import choose_labeled, mix_views, random_affine
from fastgan.train.outputs import FILES


def logits(rows, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).requires_grad_()


def entropies(x):
    p = x.softmax(1)
    q = p.mean(0)
    return -(p * p.log()).sum(1).mean(), -(q * q.log()).sum()


def test_discriminator_loss_is_the_sum_of_its_terms():
    real, fake, labeled = logits(8), logits(6, seed=1), logits(4, seed=2)
    labels = torch.tensor([0, 4, 2, 2])
    loss = catgan_discriminator_loss(real, fake, labeled, labels, supervised_weight=3.0)
    conditional, marginal = entropies(real)
    expected = -marginal + conditional - entropies(fake)[0] + 3 * F.cross_entropy(labeled, labels)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (real, fake, labeled)), torch.autograd.grad(expected, (real, fake, labeled))
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 4, 2, 2, 1, 1, 3, 0])])
def test_marginal_weight_weighs_the_marginal_entropy(labels):
    real, fake = logits(8), logits(6, seed=1)
    labeled = None if labels is None else real
    difference = catgan_discriminator_loss(real, fake, labeled, labels) - catgan_discriminator_loss(
        real, fake, labeled, labels, marginal_weight=3.0
    )
    torch.testing.assert_close(difference, 2 * entropies(real)[1])


def test_marginal_weight_falls_to_one_at_the_middle_of_the_run(tmp_path, monkeypatch):
    weights = []

    def loss(*arguments):
        weights.append(arguments[4])
        return _real_categories_loss(*arguments)

    monkeypatch.setattr(fastgan.train.catgan, "_real_categories_loss", loss)
    flags = "--labels 0 --epochs 1 --marginal-weight 3 --batch-size 1250 --views 1 --image-size 4 --architecture mlp --device cpu"
    assert run(CatGANConfig, [*flags.split(), "--output", str(tmp_path)]) == 0
    assert weights == [3.0, 2.5, 2.0, 1.5, 1.0, 1.0, 1.0, 1.0]


def test_discriminator_loss_of_labeled_real_images_is_the_same_in_one_pass():
    real, fake, labels = logits(8), logits(6, seed=1), torch.arange(8) % 5
    one_pass = catgan_discriminator_loss(real, fake, real, labels)
    separate = catgan_discriminator_loss(real, fake, real.clone(), labels)
    torch.testing.assert_close(one_pass, separate)
    torch.testing.assert_close(torch.autograd.grad(one_pass, real), torch.autograd.grad(separate, real))


def test_cross_entropy_raises_the_probability_of_the_true_class():
    labeled, labels = torch.zeros(1, 3, requires_grad=True), torch.tensor([1])
    catgan_discriminator_loss(logits(4, 3), logits(4, 3), labeled, labels).backward()
    assert labeled.grad[0, 1] < 0 < labeled.grad[0, 0]


def test_generator_loss_is_lowest_for_sure_and_evenly_spread_predictions():
    assert catgan_generator_loss(1e4 * torch.eye(5)).item() == pytest.approx(-math.log(5), abs=1e-6)
    conditional, marginal = entropies(fake := logits(6))
    torch.testing.assert_close(catgan_generator_loss(fake), conditional - marginal)


def test_feature_matching_compares_means_and_leaves_the_real_side_alone():
    real, fake = torch.ones(4, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    loss = feature_matching_loss(real, fake)
    loss.backward()
    assert loss.item() == 1.0 and real.grad is None and fake.grad is not None


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.zeros(3), torch.zeros(2, 3)), ValueError, r"real_logits must have shape \[N, K\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 4)), ValueError, "fake_logits must have 3 categories like real_logits"),
        ((torch.zeros(2, 3), torch.zeros(0, 3)), ValueError, "fake_logits must have shape"),
        ((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)), ValueError, "floating-point"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)), ValueError, "labels must be given with"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), None, torch.zeros(2).long()), ValueError, "labeled_logits must be given"),
        ((*(torch.zeros(2, 3),) * 3, torch.zeros(3).long()), ValueError, r"labels must have shape \[2\]"),
        ((*(torch.zeros(2, 3),) * 3, [0, 1]), TypeError, "labels must be a torch.Tensor, got list"),
        ((*(torch.zeros(2, 3),) * 3, torch.tensor([0, 3])), IndexError, r"labels must lie in \[0, 3\).* got 3 at row 1"),
    ],
)
def test_errors_of_the_discriminator_loss_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        catgan_discriminator_loss(*arguments)


def _gradients_of_a_process(rank, meeting_point, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    part = slice(0, 3) if rank == 0 else slice(3, 8)  # unequal shares of the batch
    real, weight = logits(8).detach()[part], torch.eye(5, dtype=torch.float64).requires_grad_()
    group = torch.distributed.group.WORLD
    loss = catgan_discriminator_loss(real @ weight, torch.zeros(2, 5), process_group=group)
    loss = loss + catgan_generator_loss(real @ weight * 2, process_group=group)
    loss.backward()
    torch.distributed.all_reduce(weight.grad)
    queue.put((rank, loss.item(), (weight.grad / 2).tolist()))
    torch.distributed.destroy_process_group()


def test_two_processes_get_the_gradients_of_one_with_the_whole_batch(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_gradients_of_a_process, args=(rank, tmp_path / "meet", queue)) for rank in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=100) for _ in processes]
    for process in processes:
        process.join()
    real, weight = logits(8).detach(), torch.eye(5, dtype=torch.float64).requires_grad_()
    loss = catgan_discriminator_loss(real @ weight, torch.zeros(2, 5)) + catgan_generator_loss(real @ weight * 2)
    loss.backward()
    assert sum(value for _, value, _ in results) / 2 == pytest.approx(loss.item(), rel=1e-6)
    for _, _, gradient in results:
        torch.testing.assert_close(torch.tensor(gradient, dtype=torch.float64), weight.grad)


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
@pytest.mark.parametrize("image_size, channels", [(28, 1), (32, 3), (64, 1)])
def test_networks_fit_each_other(architecture, image_size, channels):
    generator, classifier = catgan(image_size, channels, 7, 16, architecture, base_channels=4)
    images = generator(torch.randn(3, 16))
    assert images.shape == (3, channels, image_size, image_size)
    assert images.abs().max() <= 1
    assert classifier(images).shape == (3, 7)


def test_the_perceptron_is_that_of_the_permutation_invariant_task():
    _, classifier = catgan(architecture="mlp")
    widths = [layer.out_features for layer in classifier.modules() if isinstance(layer, torch.nn.Linear)]
    assert widths == [1000, 500, 250, 250, 250, 10]


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_noise_is_off_in_eval_mode(architecture):
    _, classifier = catgan(architecture=architecture)
    images = torch.rand(2, 1, 28, 28)
    assert not torch.equal(classifier(images), classifier(images))
    classifier.eval()
    assert torch.equal(classifier(images), classifier(images))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"architecture": "transformer"}, "architecture must be one of mlp, conv, got 'transformer'"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"hidden_noise": -1.0}, "hidden_noise must be at least 0, got -1.0"),
        ({"architecture": "conv", "image_size": 30}, "catgan: image_size must be"),
    ],
)
def test_errors_of_the_networks_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        catgan(**arguments)


def test_classifier_names_the_shape_it_wants():
    with pytest.raises(ValueError, match=r"images must have shape \[N, 1, 28, 28\], got \[2, 3, 28, 28\]"):
        catgan()[1](torch.zeros(2, 3, 28, 28))


def test_labels_are_chosen_equally_by_class_and_by_seed():
    labels = torch.arange(1000) % 10
    chosen = choose_labeled(labels, 100, seed=3)
    assert torch.equal(labels[chosen].bincount(), torch.full((10,), 10))
    assert len(chosen.unique()) == 100
    assert torch.equal(chosen, choose_labeled(labels, 100, seed=3))
    assert not torch.equal(chosen, choose_labeled(labels, 100, seed=4))
    assert choose_labeled(labels, 15, seed=0).shape == (15,)


def test_zeros_before_the_number_of_labels_mean_nothing():
    assert [CatGANConfig(labels=labels, device="cpu").labels for labels in ("00", "0100", "all")] == ["0", "100", "all"]


@pytest.mark.parametrize("count", [5, 1001])
def test_an_impossible_number_of_labels_is_refused(count):
    with pytest.raises(ValueError, match=f"--labels must be 0 or between 10, one a class, and 1000, .* got {count}"):
        choose_labeled(torch.arange(1000) % 10, count, seed=0)


def test_more_labels_of_a_class_than_exist_are_refused():
    labels = torch.cat([torch.zeros(3), torch.ones(97)]).long()
    with pytest.raises(ValueError, match="--labels 20: 10 of class 0 are needed, the data set has 3"):
        choose_labeled(labels, 20, seed=0)


def test_mixed_views_are_the_logarithm_of_the_mean_prediction():
    views = logits(6)
    expected = (views[:3].softmax(1) + views[3:].softmax(1)) / 2
    torch.testing.assert_close(mix_views(views, 2).softmax(1), expected.float(), check_dtype=False)


def test_random_affine_keeps_background_and_range():
    assert torch.equal(random_affine(torch.full((4, 1, 28, 28), -1.0)), torch.full((4, 1, 28, 28), -1.0))
    images = 2 * torch.rand(4, 3, 32, 32) - 1
    moved = random_affine(images)
    assert moved.shape == images.shape and moved.abs().max() <= 1 + 1e-6 and not torch.equal(moved, images)


def run_catgan(*flags):
    threads = torch.get_num_threads()
    try:
        return run(CatGANConfig, [str(flag) for flag in flags])
    finally:
        torch.set_num_threads(threads)


def quiet_perceptron(**settings):
    """Networks and objective of a perceptron without noise, 60 real images and as many generated ones."""
    config = CatGANConfig(**{"architecture": "mlp", "input_noise": 0.0, "hidden_noise": 0.0, "augment": False, "device": "cpu", **settings})
    dataset = config.load_data()
    torch.manual_seed(0)
    generator, classifier, objective = config.build(dataset)
    batch = Batch(normalize(dataset.images[:60]), dataset.labels[:60])
    return generator, classifier, objective, batch, generator(torch.randn(60, config.latent_dim)).detach()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("settings", [{"views": 1}, {"views": 2}, {"architecture": "conv"}], ids=str)
def test_joint_batch_norm_is_one_batch_for_the_classifier_and_running_statistics_for_the_generator(settings, fused):
    _, classifier, objective, batch, fake = quiet_perceptron(labels="all", joint_batch_norm=True, **settings)
    views = objective.config.views
    expected = copy.deepcopy(classifier)
    if fused:
        classifier = fastgan.fuse(classifier, inplace=True)
    ((loss, figures),) = objective.discriminator_losses(classifier, batch, fake)
    logits = expected(torch.cat([*[batch.images] * views, fake]))
    real, fake_logits = logits[: 60 * views], logits[60 * views :]
    reference = catgan_discriminator_loss(mix_views(real, views), fake_logits, real, batch.labels.repeat(views))
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(figures["entropy_fake"], softmax_entropy(fake_logits)[0].detach())
    loss, _ = objective.generator_loss(classifier, batch, fake.requires_grad_())
    (found,) = torch.autograd.grad(loss, fake)
    assert all(module.training for module in classifier.modules())
    reference = catgan_generator_loss(expected.eval()(fake))  # the classifier has no noise
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(found, torch.autograd.grad(reference, fake)[0], rtol=1e-3, atol=1e-6)
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(classifier.get_buffer(name), buffer, msg=name)


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_without_joint_batch_norm_each_batch_has_its_own_and_the_running_statistics_are_the_real_images(architecture):
    _, classifier, objective, batch, fake = quiet_perceptron(labels="all", joint_batch_norm=False, architecture=architecture, views=1)
    expected = copy.deepcopy(classifier)
    losses, figures = zip(*objective.discriminator_losses(fastgan.fuse(classifier, inplace=True), batch, fake))
    real = expected(batch.images)
    statistics = copy.deepcopy(dict(expected.named_buffers()))
    fake_logits = expected(fake)
    reference = catgan_discriminator_loss(real, fake_logits, real, batch.labels)
    torch.testing.assert_close(sum(losses), reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(figures[-1]["entropy_fake"], softmax_entropy(fake_logits)[0].detach(), rtol=1e-4, atol=1e-5)
    for name, buffer in statistics.items():
        torch.testing.assert_close(classifier.get_buffer(name), buffer, rtol=1e-4, atol=1e-5, msg=name)


def test_only_joint_batch_norm_sees_an_offset_of_all_generated_images():
    """Batch norm of their own subtracts it: the border of a perceptron's digits is noise without consequence."""
    losses = {}
    for joint in (None, False):
        _, classifier, objective, batch, fake = quiet_perceptron(joint_batch_norm=joint)
        losses[joint] = []
        for images in (fake, fake + 2 * torch.rand(fake.shape[1:])):
            torch.manual_seed(1)
            figures = [figures for _, figures in objective.discriminator_losses(copy.deepcopy(classifier), batch, images)]
            losses[joint].append(next(each["entropy_fake"] for each in figures if "entropy_fake" in each).item())
    assert abs(losses[None][0] - losses[None][1]) > 1e-3
    assert losses[False][0] == pytest.approx(losses[False][1], abs=1e-5)


@pytest.mark.parametrize("architecture", ["mlp", "conv"])
def test_feature_matching_tells_noise_from_images(architecture):
    _, classifier, objective, batch, _ = quiet_perceptron(generator_loss="feature-matching", architecture=architecture)
    images = objective.dataset.images
    recalibrate_batch_norm(classifier, images[:1000])
    others, noise = normalize(images[100:160]), 2 * torch.rand(60, 1, 28, 28) - 1
    losses = [objective.generator_loss(classifier, batch, fake)[0].item() for fake in (others, noise)]
    assert losses[1] > 5 * losses[0]
    assert all(module.training for module in classifier.modules())


@pytest.mark.parametrize(
    "flags", [("--labels", 0, "--architecture", "mlp"), ("--labels", 1000, "--generator-loss", "feature-matching")]
)
def test_a_run_trains_and_leaves_its_pictures(tmp_path, flags):
    size = ("--batch-size", 2500, "--epochs", 1, "--views", 1, "--base-channels", 2, "--threads", 1)
    assert run_catgan("--output", tmp_path, *size, *flags) == 0
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"entropy_real", "entropy_marginal", "entropy_fake"} <= last.keys()
    for name, entropy in (("d_real", "entropy_real"), ("d_fake", "entropy_fake")):
        assert last[name] == pytest.approx(1 - last[entropy] / math.log(20 if flags[1] == 0 else 10), abs=1e-6) and 0 < last[name] < 1
    assert ("cross_entropy" in last) == (flags[1] != 0)
    assert 0 <= last["test_error_majority" if flags[1] == 0 else "test_error"] <= 100
    assert (tmp_path / "confusion.png").stat().st_size > 0
    assert (tmp_path / "categories.png").exists() == (flags[1] == 0)
    assert {path.name for path in tmp_path.iterdir()} <= set(FILES)  # all of which a later run moves aside


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--labels", "some"), "--labels must be 'all' or a number of images, got 'some'"),
        (("--labels", 20000), "--labels must be 0 or between 10, one a class, and 10000"),
        (("--labels", 100, "--categories", 5), "--categories must be at least the number of classes with labels, 10"),
        (("--batch-size", 1), "--batch-size must be at least 2, got 1"),  # for batch norm
        (("--validation", 10000), "--validation must be below the number of training images, 10000"),
    ],
)
def test_a_run_refuses_what_cannot_be(tmp_path, capsys, flags, message):
    assert run_catgan("--output", tmp_path / "run", *flags) == 1
    assert message in capsys.readouterr().err


TOY = Path(__file__).parents[1] / "examples" / "catgan_toy.py"


def test_the_toy_refuses_a_file_as_its_folder_before_it_trains(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", [str(TOY), "--output", str(tmp_path / "file")])
    monkeypatch.setattr(torch, "manual_seed", None)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(TOY, run_name="__main__")
    assert f"--output {tmp_path / 'file'}: File exists" in capsys.readouterr().err


def test_the_toy_draws_its_picture(tmp_path):
    subprocess.run([sys.executable, TOY, "--steps", "3", "--output", tmp_path], check=True)
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
