"""Data sets in memory and their batches."""

from fastgan.data.batches import Batch, Batches, normalize
from fastgan.data.datasets import DATASETS, ImageDataset, load_dataset
from fastgan.data.idx import DataError

__all__ = ["DATASETS", "Batch", "Batches", "DataError", "ImageDataset", "load_dataset", "normalize"]
