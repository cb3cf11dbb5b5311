"""What a machine can do at best, to set measured speeds against."""

import time

import torch


def measured_peak(seconds=1.0):
    """Most GFLOP/s of a float32 matrix product (oneDNN/MKL, 1536 x 1536) on the threads in use: the share of it that a
    convolution reaches may exceed 1, as minimal filtering leaves out multiplications that are counted."""
    size = 1536
    a, b, c = torch.rand(size, size), torch.rand(size, size), torch.empty(size, size)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b, out=c)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
