"""Data sets in memory and their batches."""

from fastgan.data.batches import Batch, Batches, ClassBatches, normalize
from fastgan.data.datasets import DATASETS, ImageDataset, load_dataset
from fastgan.data.idx import DataError

__all__ = ["DATASETS", "Batch", "Batches", "ClassBatches", "DataError", "ImageDataset", "load_dataset", "normalize"]
