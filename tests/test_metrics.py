import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg
from torch import nn

from fastgan.cli import main
from fastgan.data import ImageDataset, load_dataset
from fastgan.metrics.command import _intended, _learnt
from fastgan.metrics.distances import (
    appearance, frechet_distance, kernel_distance, nearest_images, nearest_neighbour_test, precision_recall,
)
from fastgan.metrics.features import FeatureExtractor, LeNet, RandomExtractor, ScriptedExtractor, feature_extractor
from fastgan.metrics.generator import generate, real_features, save_nearest
from fastgan.train import DCGANConfig, GANConfig, Trainer


def sets(n=60, m=50, d=7, shift=0.3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator), 1.2 * torch.randn(m, d, generator=generator) + shift


def test_frechet_distance_is_that_of_scipys_matrix_root():
    real, fake = (x.double() for x in sets())
    c1, c2 = real.T.cov(), fake.T.cov()
    root = linalg.sqrtm((c1 @ c2).numpy()).real
    expected = (real.mean(0) - fake.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * root.trace()
    assert frechet_distance(real, fake) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_with_fewer_samples_than_features():
    real, _ = sets(5, 5, 20)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-5)


def test_kernel_distance_is_the_sum_over_all_pairs():
    real, fake = sets(8, 6)
    kernel = lambda x, y: (float(x.double() @ y.double()) / 7 + 1) ** 3
    within = lambda s: sum(kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1))
    across = sum(kernel(x, y) for x in real for y in fake) / (len(real) * len(fake))
    assert kernel_distance(real, fake) == pytest.approx(within(real) + within(fake) - 2 * across)


def test_kernel_distance_is_unbiased_for_small_sets():
    generator = torch.Generator().manual_seed(1)
    found = torch.tensor([kernel_distance(*torch.randn(2, 10, 4, generator=generator)) for _ in range(400)])
    assert abs(found.mean()) < 3 * found.std() / 20 and (found < 0).any()


def test_precision_recall_density_coverage_by_loops():
    real, fake = (x.double() for x in sets(30, 25, 2))
    radius = lambda s, x: sorted(float((x - y).norm()) for y in s)[3]
    inside = lambda x, s: [float((x - y).norm()) <= radius(s, y) + 1e-9 for y in s]
    found = precision_recall(real, fake, neighbours=3)
    assert found.precision == pytest.approx(sum(any(inside(x, real)) for x in fake) / 25)
    assert found.recall == pytest.approx(sum(any(inside(x, fake)) for x in real) / 30)
    assert found.density == pytest.approx(sum(sum(inside(x, real)) for x in fake) / 25 / 3)
    assert found.coverage == pytest.approx(sum(min(float((x - y).norm()) for y in fake) <= radius(real, x) + 1e-9 for x in real) / 30)


def test_nearest_neighbour_test_knows_equal_apart_and_copied_sets():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 500, 3, generator=generator)
    assert nearest_neighbour_test(a, b).accuracy == pytest.approx(0.5, abs=0.06)
    assert nearest_neighbour_test(a, b + 50).accuracy == 1
    assert nearest_neighbour_test(a, a + 1e-6).accuracy == 0


def test_nearest_images():
    images = torch.eye(5).view(5, 1, 1, 5)
    assert nearest_images(images[[3, 1]] + 0.1, images).tolist() == [3, 1]
    # Of 2100 nearly equal bright images each is the nearest to itself; squares of their norms hide that in float32.
    alike = torch.full((2100, 3, 20, 20), 255, dtype=torch.uint8)
    alike.flatten(1)[:, :12] -= (torch.arange(2100)[:, None] >> torch.arange(12) & 1).byte()
    chosen = [5, 700, 1234, 2000] * 8
    assert nearest_images(alike[chosen], alike).tolist() == chosen


@pytest.mark.parametrize("function", [frechet_distance, kernel_distance, precision_recall, nearest_neighbour_test])
def test_wrong_features_are_named(function):
    with pytest.raises(ValueError, match=rf"{function.__name__}: real must have shape \[N, D\] .* got \[1, 3\]"):
        function(torch.zeros(1, 3), torch.zeros(9, 3))
    with pytest.raises(ValueError, match=f"{function.__name__}: fake must have as many features as real, 3, got 4"):
        function(torch.zeros(9, 3), torch.zeros(9, 4))


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (3, 1, 32, 32), (3, 3, 64, 64)])
def test_extractor_takes_images_of_any_size(shape):
    extractor = FeatureExtractor(LeNet(10).eval(), 0.0, "untrained")
    features, probabilities = extractor(torch.zeros(shape, dtype=torch.uint8))
    assert features.shape == (3, 128) and probabilities.sum(1) == pytest.approx(torch.ones(3))
    torch.testing.assert_close(extractor(-torch.ones(shape))[0], features)


def test_appearance_tells_contrast_from_sharpness():
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(4, 1, 16, 16, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    assert appearance(2 * noise).contrast == pytest.approx(2 * appearance(noise).contrast)
    assert appearance(2 * noise).sharpness == pytest.approx(appearance(noise).sharpness)
    assert appearance(smooth).sharpness < appearance(noise).sharpness


@pytest.mark.parametrize("flag, value, least", [("--samples", 5, 6), ("--image-size", 0, 1), ("--threads", -1, 1)])
def test_command_refuses_what_cannot_be_before_it_trains_an_extractor(flag, value, least, capsys):
    assert main(["evaluate", flag, str(value)]) == 1
    assert capsys.readouterr() == ("", f"error: {flag} must be at least {least}, got {value}\n")


def test_command_scores_a_checkpoint_beside_held_out_images(tmp_path, monkeypatch, capsys):
    untrained = FeatureExtractor(LeNet(10).eval(), 0.5, "untrained")
    monkeypatch.setattr("fastgan.metrics.features.feature_extractor", lambda *_: untrained)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trainer = Trainer(GANConfig(device="cpu", output=str(tmp_path / "run"), max_steps=1), load_dataset("digits"))
    trainer.train()
    capsys.readouterr()
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    assert main(["evaluate", checkpoint, "--samples", "1000"]) == 0
    extractor, held_out, scored = map(json.loads, capsys.readouterr().out.splitlines())
    assert extractor == {"extractor": "untrained", "test_accuracy": 0.5}
    assert held_out["of"] == "held-out images" and scored["of"] == checkpoint
    assert main(["evaluate", checkpoint, "--samples", "1005"]) == 1
    message = f"--samples must be a multiple of 10, the networks side by side in {checkpoint}, got 1005"
    assert capsys.readouterr() == ("", f"error: {message}\n")
    assert held_out["frechet_distance"] < scored["frechet_distance"] and len(scored["intended_digit"]) == 10


@pytest.mark.parametrize("count", [10, 1000, 1500, 2000, 2010])
def test_intended_digits_are_those_of_any_number_of_images(count):
    def generator(z):  # every network draws its digit, the eighth a 1 in place of a 7
        return torch.tensor([0, 1, 2, 3, 4, 5, 6, 1, 8, 9]).repeat_interleave(len(z) // 10).view(-1, 1, 1, 1)

    def extractor(images):
        return images, torch.nn.functional.one_hot(images.flatten(), 10)

    images = generate(GANConfig(device="cpu"), generator, count)
    assert len(images) == count and _intended(extractor, images, None) == [1.0] * 7 + [0.0] + [1.0] * 2
    assert _intended(extractor, images, 1) == [0.2]


def test_distances_are_those_of_torchmetrics():
    """Torchmetrics takes features too, through a network of the user's; ours is the identity."""
    fid = pytest.importorskip("torchmetrics.image.fid")
    kid = pytest.importorskip("torchmetrics.image.kid")
    real, fake = (x.double() for x in sets(80, 80, 6))
    identity = nn.Identity()
    identity.num_features = 6
    frechet = fid.FrechetInceptionDistance(identity, normalize=True, input_img_size=(6,)).set_dtype(torch.float64)
    # One subset of all samples: then its unbiased estimate is over every pair, as ours.
    kernel = kid.KernelInceptionDistance(identity, subsets=1, subset_size=80, normalize=False)
    for metric in (frechet, kernel):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    assert frechet_distance(real, fake) == pytest.approx(float(frechet.compute()), rel=1e-5)
    assert kernel_distance(real, fake) == pytest.approx(float(kernel.compute()[0]), rel=1e-4)


def test_random_features_are_fixed_and_tell_noise_from_smooth_images():
    generator = torch.Generator().manual_seed(4)
    noise = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=generator)
    smooth = nn.functional.avg_pool2d(noise.float(), 5, 1, 2).byte()
    extractor = RandomExtractor()
    assert extractor.name == RandomExtractor().name != RandomExtractor(1).name
    features = [extractor(images)[0] for images in (noise[:20], noise[20:], smooth[:20])]
    assert features[0].shape == (20, 448)
    assert kernel_distance(features[0], features[2]) > 20 * abs(kernel_distance(features[0], features[1]))
    torch.testing.assert_close(extractor(noise[:3].float() / 127.5 - 1)[0], features[0][:3])
    assert extractor(noise[:3, :1])[0].shape == (3, 448)


class MeanColour(nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean((2, 3)) if return_features else images.float()


def test_a_scripted_network_gives_features(tmp_path):
    torch.jit.script(MeanColour()).save(tmp_path / "colour.pt")
    extractor = ScriptedExtractor(tmp_path / "colour.pt")
    features, probabilities = extractor(torch.full((2, 1, 4, 4), -1.0))
    assert torch.equal(features, torch.zeros(2, 3)) and probabilities is None
    assert torch.equal(extractor(torch.full((60, 3, 4, 4), 9, dtype=torch.uint8))[0], torch.full((60, 3), 9.0))
    assert extractor.name.startswith("colour ") and extractor.accuracy is None


def test_what_is_no_feature_network_is_named(tmp_path):
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(ValueError, match="--features .*text.pt: cannot be read as a TorchScript file"):
        ScriptedExtractor(tmp_path / "text.pt")
    torch.jit.script(nn.Identity()).save(tmp_path / "same.pt")
    with pytest.raises(ValueError, match=r"the network must return features \[2, D\], got \[2, 3, 4, 4\]"):
        ScriptedExtractor(tmp_path / "same.pt")(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="dataset must be one of .* got 'folder'; .* --features random"):
        feature_extractor("folder")


def test_real_features_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dataset = ImageDataset("folder", torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8), None)
    extractor, calls = RandomExtractor(), []

    def pixels(self, images):
        calls.append(len(images))
        return images.flatten(1).float(), None

    monkeypatch.setattr(RandomExtractor, "__call__", pixels)
    first = real_features(extractor, dataset)
    assert torch.equal(real_features(extractor, dataset), first) and calls == [9]
    assert sorted(first[:, 0].tolist()) == sorted(dataset.images[:, 0, 0, 0].tolist())


def test_nearest_images_stand_beside_their_samples_and_copies_are_at_distance_zero(tmp_path):
    pixels = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    dataset = ImageDataset("folder", pixels, None)
    copies = pixels[[4, 7]].float() / 127.5 - 1
    figures = save_nearest(tmp_path / "nearest.png", copies, dataset)
    assert figures["nearest_distance"] < 1e-5 < 1 < figures["nearest_distance_real"]
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "nearest.png").convert("RGB"))).permute(2, 0, 1)
    scale = picture.shape[2] // (8 * 10 + 2)
    small = picture[:, ::scale, ::scale]
    first, nearest = small[:, 2:10, 2:10], small[:, 2:10, 12:20]
    assert torch.equal(first, pixels[4]) and torch.equal(nearest, pixels[4])
    with pytest.raises(ValueError, match=r"samples must have shape \[N, 3, 8, 8\], got \[2, 3, 4, 4\]"):
        save_nearest(tmp_path / "nearest.png", copies[:, :, :4, :4], dataset)


def test_nearest_images_are_drawn_of_every_class_and_looked_for_in_the_one_learnt(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("fastgan.metrics.generator.save_grid", lambda path, images, columns: drawn.append(images[::2]))
    dataset = _learnt(GANConfig(digit=3, device="cpu"))
    assert dataset.labels.unique().tolist() == [3] and len(dataset) == len(dataset.images) == 1000
    samples = torch.arange(10.0).repeat_interleave(100).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)  # a hundred of each class
    save_nearest(tmp_path / "nearest.png", samples, dataset)
    assert len(drawn[0]) == 32 and drawn[0][:, 0, 0, 0].unique().tolist() == list(range(10))


def test_command_scores_checkpoints_and_folders_against_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    generator = torch.Generator().manual_seed(6)
    for name in ("real", "other"):
        (tmp_path / name).mkdir()
        for i in range(12):
            pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8, generator=generator).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    root = str(tmp_path / "real")
    config = DCGANConfig(dataset="folder", data_root=root, image_size=8, base_channels=2, batch_size=4, max_steps=1,
                         device="cpu", output=str(tmp_path / "run"))
    Trainer(config, config.load_data()).train()
    capsys.readouterr()
    assert main(["evaluate", root, str(tmp_path / "other"), str(tmp_path / "run" / "checkpoint.pt"),
                 "--dataset", "folder", "--data-root", root, "--image-size", "8", "--samples", "50",
                 "--features", "random", "--nearest"]) == 0
    extractor, same, other, scored = map(json.loads, capsys.readouterr().out.splitlines())
    assert extractor["test_accuracy"] is None and "confident" not in scored
    assert same["kernel_distance"] < other["kernel_distance"] < scored["kernel_distance"]
    assert scored["nearest_distance"] > 0 and Image.open(tmp_path / "run" / "checkpoint.nearest.png").width > 8 * 8
