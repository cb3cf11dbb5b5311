"""A flag that holds for a part of a thread's work."""

import contextlib
import threading
from collections.abc import Iterator


class Switch(threading.local):
    """Off, and on inside ``with switch.on():``, in that thread alone."""

    is_on = False

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        before, self.is_on = self.is_on, True
        try:
            yield
        finally:
            self.is_on = before
