"""Ctrl-C that waits for the end of a step, so that what is saved is whole."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class DeferredInterrupt:
    """In its ``with`` block the first Ctrl-C only sets ``asked``; it is raised at the end.

    A second Ctrl-C acts at once. Outside of the main thread, which alone receives Ctrl-C, and
    where the process ignores it, nothing changes.
    """

    def __enter__(self) -> Self:
        self.asked = False
        self._usual = signal.getsignal(signal.SIGINT)
        in_main = threading.current_thread() is threading.main_thread()
        self._installed = in_main and callable(self._usual)
        if self._installed:
            signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self._usual)

    def __exit__(self, kind: type[BaseException] | None, *others: Any) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._usual)
        if self.asked and kind is None:
            raise KeyboardInterrupt
