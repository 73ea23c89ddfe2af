"""Delay Ctrl-C to the end of a training step, so that saved states are complete."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class DeferredInterrupt:
    """Delay the first Ctrl-C inside a ``with`` block: set ``asked``, and raise it at the end.

    A second Ctrl-C acts at once. Nothing changes outside the main thread, which alone receives
    Ctrl-C, and in processes that ignore it.
    """

    def __enter__(self) -> Self:
        self.asked = False
        self._handler_before = signal.getsignal(signal.SIGINT)
        is_main = threading.current_thread() is threading.main_thread()
        self._installed = is_main and callable(self._handler_before)
        if self._installed:
            signal.signal(signal.SIGINT, self._delay)
        return self

    def _delay(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._handler_before)

    def __exit__(self, kind: type[BaseException] | None, *others: Any) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._handler_before)
        if self.asked and kind is None:
            raise KeyboardInterrupt
