"""SIGTERM and Ctrl-C: the first lets a training finish its step and save it, the second kills."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

# A scheduler that wants the machine back sends the first, a user's Ctrl-C the second.
_NOTED = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], int]]:
    """Notes a signal instead of dying of it; a second one kills at once.

    A signal that comes is never lost: if the body ends as if nothing had come, it is sent again.

    Yields:
        A function that returns the number of the signal that has come, 0 if none has.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield lambda: 0
        return
    caught: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        caught.append(number)
        for each in _NOTED:  # not a handler of ours: Python calls none while XLA computes
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.signal(each, note) for each in _NOTED}
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for each, handler in before.items():
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
    if caught:
        signal.raise_signal(caught[0])
