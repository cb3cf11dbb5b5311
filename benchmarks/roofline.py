"""What a machine can do at best, to set measured speeds against."""

import time

import torch


def measured_peak(clock=time.perf_counter, seconds=1.0):
    """Most GFLOP/s of a float32 matrix product (oneDNN/MKL, 1536 x 1536) on the threads in use: the share of it that a
    convolution reaches may exceed 1, as minimal filtering leaves out multiplications that are counted."""
    size = 1536
    a, b, c = torch.rand(size, size), torch.rand(size, size), torch.empty(size, size)
    best, end = float("inf"), clock() + seconds
    while clock() < end:
        start = clock()
        torch.mm(a, b, out=c)
        best = min(best, clock() - start)
    return 2 * size**3 / best / 1e9
