"""Weight gradients of the operators that run several layers."""

import contextlib

from fastgan import _extension


@contextlib.contextmanager
def gradients_added_in_place(put_off: bool = False):
    """Inside, ``backward()`` adds the weight gradients of conv_stack and linear_stack on the CPU to ``weight.grad`` while it computes
    them, where that exists, has the weight's layout and nobody's hooks are to see what is added: no tensor of its own, no pass
    over both. The results are the same to the bit (of linear_stack up to 256 rows). For this thread.

    With ``put_off``, gradients of conv_stack that are more than twice as large as what they are computed from are computed at the end
    of the context: where it spans several backward passes, none of these then holds them. Before it ends, ``weight.grad`` lacks them;
    where it ends with an exception, they are never added."""
    if not _extension.has_kernels("cpu"):
        yield
        return
    extension = _extension._C
    extension.finish_gradients()  # of a context around this one
    before = extension.add_gradients_in_place(True), extension.put_off_gradients(put_off)
    try:
        yield
        extension.finish_gradients()
    finally:
        extension.add_gradients_in_place(before[0])
        extension.put_off_gradients(before[1])
