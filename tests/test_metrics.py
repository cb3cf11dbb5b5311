import json

import pytest
import torch
from scipy import linalg

from fastgan.data import load_dataset
from fastgan.metrics.__main__ import main
from fastgan.metrics.distances import (
    appearance, frechet_distance, kernel_distance, nearest_images, nearest_neighbour_test, precision_recall,
)
from fastgan.metrics.features import FeatureExtractor, LeNet
from fastgan.train import GANConfig, Trainer


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


@pytest.mark.parametrize("function", [frechet_distance, kernel_distance, precision_recall, nearest_neighbour_test])
def test_wrong_features_are_named(function):
    with pytest.raises(ValueError, match=rf"{function.__name__}: real must have shape \[N, D\] .* got \[1, 3\]"):
        function(torch.zeros(1, 3), torch.zeros(9, 3))
    with pytest.raises(ValueError, match=f"{function.__name__}: fake must have as many features as real, 3, got 4"):
        function(torch.zeros(9, 3), torch.zeros(9, 4))


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (3, 1, 32, 32), (3, 3, 64, 64)])
def test_extractor_takes_images_of_any_size(shape, tmp_path):
    extractor = FeatureExtractor(LeNet(10).eval(), 0.0, "untrained", tmp_path)
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


def test_command_scores_a_checkpoint_beside_held_out_images(tmp_path, monkeypatch, capsys):
    untrained = FeatureExtractor(LeNet(10).eval(), 0.5, "untrained", tmp_path)
    monkeypatch.setattr("fastgan.metrics.__main__.feature_extractor", lambda *_: untrained)
    trainer = Trainer(GANConfig(device="cpu", output=str(tmp_path / "run"), max_steps=1), load_dataset("digits"))
    trainer.train()
    capsys.readouterr()
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    monkeypatch.setattr("sys.argv", ["metrics", checkpoint, "--family", "gan", "--samples", "1000"])
    assert main() == 0
    extractor, held_out, scored = map(json.loads, capsys.readouterr().out.splitlines())
    assert extractor == {"extractor": "untrained", "test_accuracy": 0.5}
    assert held_out["of"] == "held-out images" and scored["of"] == checkpoint
    assert held_out["frechet_distance"] < scored["frechet_distance"] and len(scored["intended_digit"]) == 10
