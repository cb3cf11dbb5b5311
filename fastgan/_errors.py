"""What commands and scripts make of errors that are no messages to the user by themselves."""

import contextlib
import os
import sys
from collections.abc import Callable

import torch

# PyTorch's allocator on the CPU raises plain RuntimeErrors, and so do sizes beyond its integers.
_MEMORY = ("can't allocate memory", "not enough memory", "size calculation overflowed", "integer multiplication overflow")


def memory_message(error: BaseException) -> str | None:
    """A line for the user where ``error`` says that memory ran out, else None."""
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in text for words in _MEMORY):
        reason = text.partition("\n")[0].rpartition("can't allocate memory: ")[2]
        return f"memory ran out{f' ({reason})' if reason else ''}; smaller images, batches or networks need less"
    return None


def until_pipe_closes(action: Callable[[], int]) -> int:
    """The exit status of ``action``; 1 where the reader of its output (``| head``) had seen enough before it ended.

    Standard streams that are closed go nowhere, and what they cannot encode is escaped: neither is an error of the action.
    """
    try:
        with contextlib.ExitStack() as stack:
            for name in ("stdout", "stderr"):
                stream = getattr(sys, name)
                if stream is None:
                    stack.callback(setattr, sys, name, None)
                    setattr(sys, name, stack.enter_context(open(os.devnull, "w")))
                elif getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
                    stream.reconfigure(errors="backslashreplace")
                    stack.callback(stream.reconfigure, errors="strict")
            status = action()
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        # Nothing more may be written, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
