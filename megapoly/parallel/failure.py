"""How a job ends when one of its ranks does: every other rank says who is gone and in what collective it stood.

Each rank has a thread that gives a sign of life in the launcher's store, watches the next rank's, and looks there for
the end of the job, which the first who knows of it writes down. So ranks end together even where the main thread waits
in a collective that never returns.
"""

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from megapoly.errors import EXIT_STATUS, SPEAKER_SECONDS, MegapolyError
from megapoly.parallel.collectives import Pending
from megapoly.parallel.mesh import Mesh, launcher_store

MISTAKE = "error: "  # how the end begins where a user's mistake is the reason, of which one rank has spoken
FAILURE_STATUS = 1


@contextlib.contextmanager
def ending_together(mesh: Mesh, timeout_minutes: float) -> Iterator[None]:
    """While open, a rank that fails, is killed or stands still ends all of them, within the timeout.

    Errors of a user pass through. Any other ends the process here, with one line where it comes from another rank.
    """
    if mesh.world.size == 1:
        yield
        return
    watch = _Watch(mesh, 60 * timeout_minutes)
    try:
        yield
    except MegapolyError as error:
        watch.stop()  # first: it would act on the end
        watch.end(f"{MISTAKE}{error}")
        raise
    except Exception as error:
        if _is_from_outside(error):
            watch.stood = list(traceback.walk_tb(error.__traceback__))
            watch.leave(watch.find_culprit(str(error)))
        watch.stop()
        traceback.print_exc()
        sys.stderr.flush()
        watch.end(f"{watch.name} ended with {type(error).__name__}: {error}")
        os._exit(FAILURE_STATUS)
    watch.stop()


def _is_from_outside(error: Exception) -> bool:
    """Whether a collective failed, rather than anything of this rank's own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


Frames = list[tuple[FrameType, int]]  # with the line in each, outermost first


def _frames_of_all_threads() -> Frames:
    """The main thread's first: on a GPU, backward passes run in another."""
    own, main = threading.get_ident(), threading.main_thread().ident
    stacks = sorted(sys._current_frames().items(), key=lambda entry: entry[0] != main)
    return [pair for ident, top in stacks if ident != own for pair in [*traceback.walk_stack(top)][::-1]]


def describe(frames: Frames, mesh: Mesh) -> str:
    """Where a rank stands: step and phase, the collective and its axis as far as they show, the line of our code."""
    names = [frame.f_code.co_name for frame, _ in frames]
    ours = [pair for pair in frames if "megapoly" in Path(pair[0].f_code.co_filename).parts]
    words = []
    for (frame, _), (following, _) in itertools.pairwise(ours):
        if frame.f_code.co_name == "train_step":
            phase = next((name for name in ("backward", "forward") if name in names), following.f_code.co_name)
            words = [f"train step {frame.f_locals.get('step')}", phase]
    words.append(_collective(frames, mesh))
    frame, line = ours[-1] if ours else frames[-1]
    return (
        f"{', '.join(filter(None, words))} ({frame.f_code.co_qualname}, {Path(frame.f_code.co_filename).name}:{line})"
    )


def _collective(frames: Frames, mesh: Mesh) -> str:
    """The innermost collective of a stack, with its axis where one is at hand; empty where there is none."""
    operation = ""
    for frame, _ in reversed(frames):
        here = frame.f_locals
        if isinstance(here.get("self"), Pending):
            return str(here["self"].what)
        if frame.f_code.co_filename.endswith("distributed_c10d.py") and not operation:
            name = frame.f_code.co_name
            operation = "" if name.startswith("_") or name == "wrapper" else name
        for value in [*here.values(), *getattr(here.get("self"), "__dict__", {}).values()]:
            for axis in mesh.axes:
                if axis.group is not None and (value is axis or value is axis.group):
                    return f"{operation or frame.f_code.co_name} over {axis.name}"
    return operation


class _Watch:
    """The thread, and what ranks tell each other in the store: where they run, signs of life, and the end."""

    def __init__(self, mesh: Mesh, timeout: float) -> None:
        self.mesh, self.rank = mesh, mesh.world.rank
        self._others = [rank for rank in range(mesh.world.size) if rank != self.rank]
        self.host = socket.gethostname()
        self.name = f"rank {self.rank} ({self.host}, process {os.getpid()})"
        self.interval, self.limit = min(5.0, timeout / 20), 0.9 * timeout
        self.store = launcher_store()
        self.store.set(f"rank/{self.rank}", json.dumps([self.host, os.getpid()]))
        self.store.set(f"sign/{self.rank}", "")
        self.store.wait([f"{key}/{rank}" for key in ("rank", "sign") for rank in self._others])
        self.stood: Frames | None = None  # where the main thread stood when a collective failed there
        self._leaving = threading.Lock()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        # Python's own handler would wait for the main thread, which may never come back from a collective.
        self._handler = signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch; this rank needs the others no more."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, self._handler)
        self._waker.send(b"\0")
        self._thread.join()

    def end(self, reason: str) -> str:
        """Write down why the job ends, unless somebody has; returns the reason that stands."""
        return self.store.compare_set("end", "", reason).decode()

    def leave(self, reason: str, status: int = FAILURE_STATUS) -> None:
        """End this process, saying where it stood and who is gone; after a user's mistake, silently."""
        with self._leaving:  # for ever
            if reason.startswith(MISTAKE):
                # The launcher would end the rank that speaks as soon as this one is gone.
                select.select([self._woken], [], [], SPEAKER_SECONDS)
                os._exit(EXIT_STATUS)
            where = describe(self.stood or _frames_of_all_threads(), self.mesh)
            print(f"{self.name}: {where}: {reason}", file=sys.stderr, flush=True)
            os._exit(status)

    def find_culprit(self, error: str) -> str:
        """Who is gone; where that does not show at once, who gives no more signs of life."""
        try:
            before = self._signs()
            until = time.monotonic() + 3 * self.interval
            while time.monotonic() < until:
                if (reason := self._known_culprit()) is not None:
                    return reason
                time.sleep(self.interval / 4)
            silent = [rank for rank, sign in self._signs().items() if sign == before[rank]]
            if silent:
                return self.end(f"{self._name(silent[0])} gives no sign of life")
            return self.end(f"no rank is known to be gone ({' '.join(error.split())})")
        except dist.DistError as gone:
            return f"the launcher's store is gone ({gone})"

    def _known_culprit(self) -> str | None:
        """Who is gone: as somebody has written down, else a process of this host."""
        if self.store.check(["end"]):
            return self.store.get("end").decode()
        for rank in self._others:
            if (state := self._state(rank)) is not None:
                return self.end(f"{self._name(rank)} {state}")
        return None

    def _state(self, rank: int) -> str | None:
        """What is wrong with a rank's process, where it is of this host."""
        host, process = json.loads(self.store.get(f"rank/{rank}"))
        if host != self.host or not Path("/proc/self/stat").exists():
            return None
        try:
            letter = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "is gone"
        return {"Z": "is gone", "X": "is gone", "T": "is stopped", "t": "is stopped"}.get(letter)

    def _name(self, rank: int) -> str:
        host, process = json.loads(self.store.get(f"rank/{rank}"))
        return f"rank {rank} ({host}, process {process})"

    def _signs(self) -> dict[int, bytes]:
        return {rank: self.store.get(f"sign/{rank}") for rank in self._others}

    def _run(self) -> None:
        following = (self.rank + 1) % self.mesh.world.size
        seen, since = b"", time.monotonic()
        try:
            while True:
                self.store.set(f"sign/{self.rank}", str(time.time()))
                if self.store.check(["end"]):
                    self.leave(self.store.get("end").decode())
                sign = self.store.get(f"sign/{following}")
                if sign != seen:
                    seen, since = sign, time.monotonic()
                silence = time.monotonic() - since
                if silence > self.limit:
                    self.end(f"{self._name(following)} has given no sign of life for {silence:.0f} s")
                if select.select([self._woken], [], [], self.interval)[0]:
                    if self._woken.recv(1)[0] != signal.SIGTERM:
                        return
                    reason = self._known_culprit() or self.end(f"{self.name} was ended by SIGTERM")
                    self.leave(reason, 128 + signal.SIGTERM)
        except dist.DistError as error:
            self.leave(f"the launcher's store is gone ({error})")
