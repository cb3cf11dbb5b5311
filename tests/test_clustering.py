"""Errors of clusterings: maps from categories to classes, confusion, evaluation in eval mode."""

import pytest
import torch
from torch import nn

from fastgan.metrics.clustering import (
    UNMAPPED, count_categories, evaluate, hungarian_map, majority_map, mean_and_std, predict, recalibrate_batch_norm,
)


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


def test_mean_and_sample_standard_deviation_over_seeds():
    assert mean_and_std([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1.0))
    assert mean_and_std([1.5]) == (1.5, 0.0)
