"""Weight gradients of the operators that run several layers."""

import contextlib

from fastgan import _extension


@contextlib.contextmanager
def gradients_added_in_place():
    """Inside, ``backward()`` adds the weight gradients of conv_stack and linear_stack on the CPU to ``weight.grad`` while it computes
    them, where that exists, has the weight's layout and nobody's hooks are to see what is added: no tensor of its own, no pass
    over both. The results are the same to the bit (of linear_stack up to 256 rows, the most that fuse gives it). For this thread."""
    if not _extension.has_kernels("cpu"):
        yield
        return
    before = _extension._C.add_gradients_in_place(True)
    try:
        yield
    finally:
        _extension._C.add_gradients_in_place(before)
