"""Where a rank's main thread is, and after which step all ranks stop when one of them is asked to.

To stop together costs a step nothing: no collective, no wait for the device. Each rank commits to a step before it
begins it. Asked to stop, a rank commits to no further one and tells what it has committed to; the highest of all is the
last step. Whoever has committed to less goes on to it, so that nobody waits for a rank that has stopped. What
counts is how many steps this job has begun, which only grows: a step's number does not where the run goes back.
"""

import threading
import time


class Progress:
    """What the main thread tells those who watch it, and what they tell it; `is_bounded`: a step must end in time."""

    def __init__(self) -> None:
        self.phase = "start"
        self.is_bounded = False
        self.since = time.monotonic()
        self.loading = 0.0  # seconds spent on batches so far
        self.reason = ""  # why the run stops early
        self._committed = 0
        self._last: int | None = None
        self._is_frozen = False
        self._lock = threading.Lock()
        self._settled = threading.Event()

    def enter(self, phase: str, is_bounded: bool = True) -> None:
        """The main thread begins something; where it is bounded, standing still in it is a hang."""
        self.phase, self.is_bounded = phase, is_bounded
        self.beat()

    def beat(self) -> None:
        """The main thread has come further."""
        self.since = time.monotonic()

    def standstill(self) -> float:
        """Seconds since the last sign of progress in something bounded, else 0."""
        return time.monotonic() - self.since if self.is_bounded else 0.0

    def stops_after(self, step: int) -> bool:
        """Whether the run ends after this step; if not, this rank is committed to the next one."""
        with self._lock:
            if not self._is_frozen:
                self._committed += 1
                return False
        self.enter(f"wait for all ranks to name their step, after step {step}", is_bounded=False)
        self._settled.wait()
        assert self._last is not None
        if self._committed >= self._last:
            return True
        self._committed += 1
        return False

    def freeze(self) -> int:
        """Commit to no further step until the last one is settled; returns that committed to."""
        with self._lock:
            self._is_frozen = True
            return self._committed

    def settle(self, last: int, reason: str) -> None:
        """All ranks end after this step."""
        self._last, self.reason = last, reason
        self._settled.set()

    def stop_alone(self, reason: str) -> None:
        """Stop after the step under way; for a signal handler of a rank that is alone, so it takes no lock."""
        self._is_frozen = True
        self.settle(0, reason)
