"""Commands that are ended early take away what they had begun to write."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def unwind_on_signals() -> Iterator[None]:
    """While the body runs, SIGTERM and a closed terminal end it as Ctrl-C does: through its own cleaning up.

    Without this Python ends at once and leaves half-written files. A second signal does not disturb the cleaning up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {each: signal.signal(each, end) for each in _SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def cancellable(command: Callable[P, T]) -> Callable[P, T]:
    """A command that cleans up when it is ended by a signal."""

    @functools.wraps(command)
    def run(*arguments: P.args, **named: P.kwargs) -> T:
        with unwind_on_signals():
            return command(*arguments, **named)

    return run
