"""When the next request may leave: evenly spaced, and not before a server says so."""

import threading
import time
from collections.abc import Callable


class Pace:
    """Turns for many threads, `per_minute` of them a minute and at even distances; None for no limit.

    `clock` is that of the `time` module unless a test has another.
    """

    def __init__(self, per_minute: float | None, *, clock: Callable[[], float] = time.monotonic):
        self.gap = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._lock, self._next = clock, threading.Lock(), clock()

    def wait(self, sleep: Callable[[float], object] = time.sleep) -> None:
        """Return when it is this caller's turn, after `sleep` for as long as that takes."""
        with self._lock:
            turn = max(self._clock(), self._next)
            self._next = turn + self.gap
        while (left := turn - self._clock()) > 0:
            sleep(left)

    def hold(self, seconds: float) -> None:
        """No turn that is not given yet comes within `seconds` from now."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)
