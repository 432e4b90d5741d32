"""How a job ends when one of its ranks does, hangs or is asked to: together, and saying who and where.

Each rank has a thread that gives a sign of life in the launcher's store, watches the next rank's and its own main
thread's progress, and looks there for the end of the job, which the first who knows of it writes down. So ranks end
together even where the main thread waits in a collective that never returns. A second thread watches whether the store
answers the first. The same threads agree on the step after which all stop when a rank gets SIGTERM, SIGUSR1 or SIGINT.
"""

import contextlib
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

import torch.distributed as dist

from megapoly.errors import EXIT_STATUS, FAILURE_STATUS, SPEAKER_SECONDS, MegapolyError, is_read
from megapoly.parallel.joining import is_launchers_store
from megapoly.parallel.mesh import Mesh, launcher_store
from megapoly.parallel.progress import Progress
from megapoly.parallel.stacks import Frames, collective, describe, frames_of_all_threads, report, stacks_of_this_rank

MISTAKE = "error: "  # how the end begins where a user's mistake is the reason, of which one rank has spoken
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # Slurm's, before it takes the hosts away, and Ctrl-C
SETTLE_SECONDS = 0.1  # between two looks at the steps that others have committed to


@contextlib.contextmanager
def ending_together(mesh: Mesh, timeout_minutes: float, progress: Progress, run_dir: str) -> Iterator[None]:
    """While open, a rank that fails, is killed or stands still ends all of them, within the timeout.

    Errors of a user pass through. Any other ends the process here, with one line where it comes from another rank.
    Where no rank makes progress, the stacks of all are written to run_dir. Signals to stop reach `progress`.
    """
    if mesh.world.size == 1:
        with _stopping_alone(progress):
            yield
        return
    watch = _Watch(mesh, 60 * timeout_minutes, progress, Path(run_dir))
    try:
        yield
    except MegapolyError as error:
        watch.stop()  # first: it would act on the end
        watch.end(f"{MISTAKE if error.status == EXIT_STATUS else ''}{error}")
        watch.await_readers()
        raise
    except Exception as error:
        if _is_from_outside(error):
            watch.stood = list(traceback.walk_tb(error.__traceback__))
            watch.leave(watch.find_culprit(str(error)))
        watch.stop()
        if isinstance(error, BrokenPipeError) and not is_read():
            watch.end(f"{MISTAKE}nobody reads what rank {watch.rank} prints")
            watch.await_readers()
            raise
        _say(traceback.format_exc())
        watch.end(f"{watch.name} ended with {type(error).__name__}: {error}")
        os._exit(FAILURE_STATUS)
    else:
        watch.stop()
    finally:
        watch.is_over.set()


@contextlib.contextmanager
def _stopping_alone(progress: Progress) -> Iterator[None]:
    def stop(number: int, _: object) -> None:
        progress.stop_alone(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    """Print to stderr in one piece; an end does not fail for a log without room."""
    with contextlib.suppress(OSError):
        print(text, end="", file=sys.stderr, flush=True)


def _is_from_outside(error: Exception) -> bool:
    """Whether a collective failed, rather than anything of this rank's own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


class _Watch:
    """The thread, and what ranks tell each other in the store: where they run, signs of life, and the end."""

    def __init__(self, mesh: Mesh, timeout: float, progress: Progress, run_dir: Path) -> None:
        self.mesh, self.rank = mesh, mesh.world.rank
        self.progress, self.run_dir = progress, run_dir
        self._others = [rank for rank in range(mesh.world.size) if rank != self.rank]
        self.host = socket.gethostname()
        self.name = f"rank {self.rank} ({self.host}, process {os.getpid()})"
        self.interval, self.limit = min(5.0, timeout / 20), 0.75 * timeout  # time left to gather stacks
        self.store = launcher_store(mesh)
        self.store.set(f"rank/{self.rank}", json.dumps([self.host, os.getpid()]))
        self.store.set(f"sign/{self.rank}", "")
        self.store.wait([f"{key}/{rank}" for key in ("rank", "sign") for rank in self._others])
        self._is_frozen = self._is_settled = self._has_told = self._is_interrupted = False
        self.stood: Frames | None = None  # where the main thread stood when a collective failed there
        self._leaving = threading.Lock()
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        # Python's own handler would wait for the main thread, which may never come back from a collective.
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._holds_store = self.rank == 0 and not is_launchers_store()
        holder = "the launcher" if is_launchers_store() else self._name(0)
        self._silent_store = f"{holder}, which holds the store of the job, gives no sign of life"
        self._rounds, self.is_over = 0, threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="guard", daemon=True).start()

    def stop(self) -> None:
        """End the watch; this rank needs the others no more."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            # Once all stop together, the launcher's signal for the first of them that is gone must not reach another.
            signal.signal(number, signal.SIG_IGN if self._is_settled else handler)
        self._waker.send(b"\0")
        self._thread.join()

    def end(self, reason: str) -> str:
        """Write down why the job ends, unless somebody has; returns the reason that stands."""
        return self.store.compare_set("end", "", reason).decode()

    def await_readers(self) -> None:
        """Where the store ends with this process, let the others read there first why they end."""
        self.store.set(f"read/{self.rank}", "")
        until = time.monotonic() + 2 * self.interval
        while self._holds_store and time.monotonic() < until:
            if self.store.check([f"read/{rank}" for rank in self._others]):
                return
            time.sleep(self.interval / 20)

    def leave(self, reason: str, sent: signal.Signals | None = None) -> None:
        """End this process, saying where it stood and who is gone; after a user's mistake, silently.

        `sent` is the signal by which the launcher asks for it.
        """
        with self._leaving:  # for ever
            if reason.startswith(MISTAKE):
                if sent is None:
                    self._let_the_speaker_finish()
                os._exit(EXIT_STATUS)
            where = describe(self.stood or frames_of_all_threads(), self.mesh)
            _say(f"{self.name}: {where}: {reason}\n")
            os._exit(FAILURE_STATUS if sent is None else 128 + sent)

    def _let_the_speaker_finish(self) -> None:
        """Wait: the launcher would end the rank that speaks, mostly the main one, as soon as this one is gone."""
        until = time.monotonic() + SPEAKER_SECONDS
        main = json.loads(self.store.get("rank/0"))
        self.store.set(f"read/{self.rank}", "")  # from here on there may be no store
        while time.monotonic() < until and self._state(*main) is None:
            if self._is_woken(SETTLE_SECONDS):
                return

    def find_culprit(self, error: str) -> str:
        """Who is gone; where that does not show at once, who gives no more signs of life."""
        with self._leaving:
            pass  # where the watch is ending this process, it knows
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
            if (state := self._state(*json.loads(self.store.get(f"rank/{rank}")))) is not None:
                return self.end(f"{self._name(rank)} {state}")
        return None

    def _state(self, host: str, process: int) -> str | None:
        """What is wrong with a rank's process, where it is of this host."""
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
                self._rounds += 1
                self.store.set(f"sign/{self.rank}", str(time.time()))
                if self.store.check(["end"]):
                    self.leave(self.store.get("end").decode())
                sign = self.store.get(f"sign/{following}")
                if sign != seen:
                    seen, since = sign, time.monotonic()
                silence, standstill = time.monotonic() - since, self.progress.standstill()
                if silence > self.limit:
                    self._end_hang(f"{self._name(following)} gives no sign of life, for {silence:.0f} s now")
                elif standstill > self.limit:
                    self._end_hang(f"no progress for {standstill:.0f} s in {self.progress.phase}")
                elif self.store.check(["hang"]):
                    self._tell()
                self._settle()
                is_settling = self._is_frozen and not self._is_settled
                if self._is_woken(SETTLE_SECONDS if is_settling else self.interval):
                    number = self._woken.recv(1)[0]
                    if number not in STOP_SIGNALS:
                        return
                    self._take(signal.Signals(number))
        except dist.DistError as error:
            self.leave(f"the launcher's store is gone ({error})")
        except Exception as error:  # without this thread nobody would hear of a signal or a hang
            self.leave(f"the watch of this rank failed with {type(error).__name__}: {error}")

    def _is_woken(self, seconds: float) -> bool:
        """Whether a signal or the end comes within so long."""
        poll = select.poll()  # select() refuses descriptors from 1,024 on, and each data file has one
        poll.register(self._woken, select.POLLIN)
        return bool(poll.poll(1000 * seconds))

    def _guard(self) -> None:
        """End this rank where the store does not answer: operations on one that a frozen process holds never end."""
        seen = rounds = 0
        while not self.is_over.wait(self.interval):  # counted, as a clock also runs while this process is stopped
            rounds = rounds + 1 if self._rounds == seen else 0
            seen = self._rounds
            if rounds * self.interval > self.limit:
                self.leave(f"{self._silent_store}, for {rounds * self.interval:.0f} s now")

    # Stopping together

    def _take(self, sent: signal.Signals) -> None:
        """A signal to stop; SIGTERM is also how the launcher ends a rank when another is gone."""
        if sent == signal.SIGINT and self._is_interrupted:
            self.leave("a second SIGINT, nothing is saved", sent)
        self._is_interrupted |= sent == signal.SIGINT
        if sent == signal.SIGTERM and (reason := self._known_culprit()) is not None:
            self.leave(reason, sent)
        self.store.compare_set("stop", "", f"{sent.name} to {self.name}")

    def _settle(self) -> None:
        """Where somebody is to stop, tell the step that this rank is committed to, and settle once all have."""
        if self._is_settled or not self.store.check(["stop"]):
            return
        if not self._is_frozen:
            self.store.set(f"stop/{self.rank}", str(self.progress.freeze()))
            self._is_frozen = True
        keys = [f"stop/{rank}" for rank in range(self.mesh.world.size)]
        if self.store.check(keys):
            self._is_settled = True
            self.progress.settle(max(int(self.store.get(key)) for key in keys), self.store.get("stop").decode())

    # Hangs

    def _tell(self) -> None:
        """Write down where this rank stands, for the report of a hang."""
        if self._has_told:
            return
        self._has_told = True
        frames = frames_of_all_threads()
        seconds = time.monotonic() - self.progress.since
        entry = {
            "line": f"{self.progress.phase} for {seconds:.0f} s: {describe(frames, self.mesh)}",
            "waits": bool(collective(frames, self.mesh)),
            "stacks": stacks_of_this_rank(),
        }
        self.store.set(f"stacks/{self.rank}", json.dumps(entry))

    def _end_hang(self, found: str) -> None:
        """End the job for a hang; the first rank that finds it gathers the stacks of all."""
        self._tell()
        if self.store.compare_set("hang", "", self.name).decode() != self.name:
            return
        ranks = range(self.mesh.world.size)
        until = time.monotonic() + 2 * self.interval
        while time.monotonic() < until and not self.store.check([f"stacks/{rank}" for rank in ranks]):
            time.sleep(self.interval / 10)
        told = [rank for rank in ranks if self.store.check([f"stacks/{rank}"])]
        entries = {rank: json.loads(self.store.get(f"stacks/{rank}")) for rank in told}
        silent = [rank for rank in ranks if rank not in entries]
        idle = [rank for rank in told if not entries[rank]["waits"]]
        if silent:
            found = found if "sign of life" in found else f"{self._name(silent[0])} gives no sign of life; {found}"
        elif idle and len(idle) < len(told):
            found = f"{self._name(idle[0])} is in no collective, and others wait for it; {found}"
        text = report(f"hang: {found}", {rank: self._name(rank) for rank in ranks}, entries)
        path = self.run_dir / time.strftime("hang-%Y%m%dT%H%M%S.txt")
        try:
            path.write_text(text, encoding="utf-8")
            found += f"; the stacks of all ranks are in {path}"
        except OSError as error:
            found += f"; {path} cannot be written ({error.strerror})"
        _say(text)
        self.end(found)
