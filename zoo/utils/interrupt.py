"""Recognize Ctrl-C even where other code turns it into another error."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, SIGTERM and SIGHUP, and for any error after them.

    Code in C may turn it into another error: torch.asarray, with which safetensors reads, raises a
    ValueError, which would be reported as bad input. A signal that is ignored stays so (nohup).
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # no signal handler can be set here
        return
    pressed: list[int] = []
    with ExitStack() as stack:
        for number in STOPS:
            before = signal.getsignal(number)
            if callable(before) or (before == signal.SIG_DFL and number != signal.SIGINT):
                signal.signal(number, _press(pressed, before))
                stack.callback(signal.signal, number, before)
        try:
            yield
        except Exception as error:
            if pressed:
                raise KeyboardInterrupt from error
            raise


def _press(pressed: list[int], before: Any) -> Callable[[int, FrameType | None], None]:
    def press(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        if callable(before):
            before(number, frame)
        raise KeyboardInterrupt

    return press
