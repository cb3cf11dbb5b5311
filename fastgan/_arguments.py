"""Checks of arguments that several public functions share."""

import functools
import inspect
import numbers

import torch


def check_tensor(function, name, value):
    """Raises a TypeError that names the argument if it is no tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{function}: {name} must be a torch.Tensor, got {type(value).__name__}")


def check_integer(function, name, value):
    """Raises a TypeError that names the argument if it is no integer."""
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{function}: {name} must be an integer, got {type(value).__name__}")


def check_counts(function, **counts):
    """Raises a TypeError or ValueError that names the first argument that is no integer of at least 1."""
    for name, count in counts.items():
        check_integer(function, name, count)
        if count < 1:
            raise ValueError(f"{function}: {name} must be at least 1, got {count}")


def check_not_negative(function, **values):
    """Raises a TypeError or ValueError that names the first argument that is no number of at least 0."""
    for name, value in values.items():
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")
        if not value >= 0:
            raise ValueError(f"{function}: {name} must be at least 0, got {value}")


MOST_THREADS = 1024


def set_threads(threads):
    """Sets the number of CPU threads that a command was given by --threads; None leaves PyTorch's choice."""
    if threads is None:
        return
    if not 1 <= threads <= MOST_THREADS:
        bound = "at least 1" if threads < 1 else f"at most {MOST_THREADS}"
        raise ValueError(f"--threads must be {bound}, got {threads}")
    torch.set_num_threads(threads)


def takes_tensor(function):
    """Decorates an operator: its first operand must be a tensor, or something that stands in for one by __torch_function__, as
    torch.fx's proxies do, which then gets the call."""
    operand_name = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def checked(*args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):  # nearly always: nothing else is asked
            return function(*args, **kwargs)
        if not args and operand_name not in kwargs:
            return function(**kwargs)  # Python's own error
        operand = args[0] if args else kwargs[operand_name]
        if not isinstance(operand, torch.Tensor) and hasattr(type(operand), "__torch_function__"):
            return torch.overrides.handle_torch_function(checked, (operand,), *args, **kwargs)
        check_tensor(function.__name__, operand_name, operand)
        return function(*args, **kwargs)

    return checked
