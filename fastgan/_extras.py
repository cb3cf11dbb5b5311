"""Libraries that only some commands need, and that are extras of the package."""

import importlib
from types import ModuleType


def require(name: str, extra: str, purpose: str) -> ModuleType:
    """Import a library of an extra.

    Raises:
        ModuleNotFoundError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{purpose} needs {error.name}, which is not installed: pip install 'fastgan[{extra}]'", name=error.name
        ) from error
