"""In which dtype numbers are added up."""

import torch


def sums_dtype(tensor):
    """Of the sums and statistics of `tensor`, whatever its own is."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
