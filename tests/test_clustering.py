"""Errors of clusterings: maps from categories to classes, confusion, evaluation in eval mode."""

import copy

import pytest
import torch
from torch import nn

import fastgan
from fastgan.metrics.clustering import (
    UNMAPPED, count_categories, evaluate, hungarian_map, majority_map, mean_and_std, predict, recalibrate_batch_norm,
)
from fastgan.nn import GaussianNoise


def test_categories_are_counted_by_class():
    counts = count_categories(torch.tensor([0, 0, 2, 2, 2]), torch.tensor([1, 1, 0, 1, 0]), 3, 2)
    assert counts.tolist() == [[0, 2], [0, 0], [2, 1]]


def test_majority_map_lets_categories_share_a_class():
    assert majority_map(torch.tensor([[5, 1], [3, 2], [0, 0]])).tolist() == [0, 0, UNMAPPED]


def test_hungarian_map_is_one_to_one():
    assert hungarian_map(torch.tensor([[5, 1], [3, 2]])).tolist() == [0, 1]
    assert sorted(hungarian_map(torch.tensor([[5, 1], [3, 2], [9, 0]])).tolist()) == [UNMAPPED, 0, 1]


def test_error_counts_unmapped_categories_as_wrong():
    categories, labels = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 0, 1])
    result = evaluate(categories, labels, 2, torch.tensor([0, 1, UNMAPPED]))
    assert result.error == 50.0
    assert result.confusion.tolist() == [[1, 0, 1], [0, 1, 1]]


def test_error_without_a_map_is_that_of_a_classifier():
    assert evaluate(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2).error == pytest.approx(100 / 3)


def test_a_classifiers_categories_beyond_the_classes_are_errors_of_the_last_column():
    result = evaluate(torch.tensor([3, 1, 2, 0]), torch.tensor([0, 1, 1, 0]), 2)
    assert result.error == 50.0
    assert result.confusion.tolist() == [[1, 0, 1], [0, 1, 1]]


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"same shape \[N\] with N > 0, got \[2\] and \[3\]"):
        evaluate(torch.zeros(2).long(), torch.zeros(3).long(), 2)


def test_prediction_is_in_eval_mode_over_the_whole_set():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.9), nn.Linear(4, 3)).train()
    images = torch.randint(256, (7, 1, 2, 2), dtype=torch.uint8)
    parts = torch.cat([predict(network, image[None]) for image in images])
    assert torch.equal(predict(network, images, batch_size=3), parts)
    assert network.training


def test_batch_norm_is_measured_anew():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(1))
    network[1].running_mean.fill_(100)
    images = torch.arange(10.0).view(10, 1, 1, 1)
    network.eval()
    recalibrate_batch_norm(network, images, batch_size=5)
    assert network[1].running_mean.item() == pytest.approx(4.5)
    assert not network.training


@pytest.mark.parametrize("fused", [False, True])
def test_batch_norm_is_measured_on_what_it_has_in_eval_mode(fused):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), GaussianNoise(3.0), nn.Linear(4, 16), nn.BatchNorm1d(16), nn.LeakyReLU(0.2), GaussianNoise(3.0), nn.Dropout(0.5),
        nn.Linear(16, 3), nn.BatchNorm1d(3, momentum=0.3),
    )  # fmt: skip
    network = fastgan.fuse(network, inplace=True) if fused else network
    network[4].eval()
    images = torch.rand(400, 1, 2, 2)
    recalibrate_batch_norm(network, images, batch_size=100)
    assert [module.training for module in network] == [True] * 4 + [False] + [True] * 4
    assert network[8].momentum == 0.3
    hidden = network[2](images.flatten(1))
    assert torch.allclose(network[3].running_mean, hidden.mean(0), atol=1e-5)
    variances = hidden.unflatten(0, (4, 100)).var(1).mean(0)
    assert torch.allclose(network[3].running_var, variances, rtol=1e-4)
    outputs = network.eval()(images)
    assert torch.allclose(outputs.mean(0), torch.zeros(3), atol=1e-2)  # 0.3 and more if measured with noise or dropout
    assert torch.allclose(outputs.std(0), torch.ones(3), atol=2e-2)


def test_running_statistics_stay_where_an_image_does_not_fit():
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    network(torch.rand(5, 1, 2, 2))
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(RuntimeError):
        recalibrate_batch_norm(network, torch.rand(5, 1, 3, 3))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training and network[1].training and network[1].momentum == 0.1


def test_mean_and_sample_standard_deviation_over_seeds():
    assert mean_and_std([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1.0))
    assert mean_and_std([1.5]) == (1.5, 0.0)
