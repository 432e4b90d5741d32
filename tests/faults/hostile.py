"""What doctored files are made of: payloads that would leave a mark, values that lie, and trees with one of them."""

import contextlib
import copy
import json
import pickle
import random
import resource
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megapoly.checkpoint.storage import sealed
from megapoly.errors import MegapolyError

ROOM = 1 << 30  # address space that a reader may take beside what the process has
HUGE = [10**18, 2**63 - 1, 2**63, 10**40, 2**31, 2**48 - 1]
VALUES: list[Any] = [
    *HUGE, -1, -(2**63), 0, 1, None, True, 1e308, float("nan"), float("inf"), "", "\0", "../../../etc/passwd", "/etc/passwd",
    "a" * 100_000, "\ud800", [], {}, [[]], [10**18] * 3, [None], {"a": {"b": []}}, "!!python/object/apply:os.system [x]",
]  # fmt: skip


def payload(mark: Path) -> bytes:
    """A pickle that touches `mark` when it is loaded."""

    class Call:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (mark,)

    return pickle.dumps(Call())


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to everything in plain data."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def doctored(tree: Any, rng: random.Random) -> Any:
    """Plain data with one to three of its places holding what they should not, or gone, or under another name."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice([*places(tree)][1:] or [()])
        if not path:
            return rng.choice(VALUES)
        holder = tree
        for key in path[:-1]:
            holder = holder[key]
        how = rng.random()
        if how < 0.15:
            del holder[path[-1]]
        elif how < 0.3 and isinstance(holder, dict):
            holder[str(rng.choice(VALUES))] = holder.pop(path[-1])
        else:
            holder[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    return tree


def altered(content: bytes, rng: random.Random) -> bytes:
    """Bytes of which some are others, cut off, doubled or in front of what is no text."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = int(len(changed) * rng.random() ** 2)  # more at the beginning, where files say what they are
        how = rng.randrange(5)
        if how == 0:
            del changed[at:]
        elif how == 1:
            changed[at:at] = changed[at : at + rng.randrange(1, 200)]
        elif how == 2:
            changed[at : at + 8] = rng.randbytes(8)
        elif changed:
            at = min(at, len(changed) - 1)
            changed[at] = rng.choice([0, 255, 0x7F, changed[at] ^ 1 << rng.randrange(8)])
    return bytes(changed)


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda tree: tree) -> None:
    """Change a checkpoint's metadata.json and give it checksums and sizes that fit, as a forger would."""
    path = folder / "metadata.json"
    tree = json.loads(path.read_text())
    del tree["crc32"]
    for name in ("state.json",):
        content = (folder / name).read_bytes()
        tree["files"][name] = [len(content), zlib.crc32(content), len(content)]
    changed = change(tree)
    path.write_bytes(sealed(changed) if isinstance(changed, dict) else json.dumps(changed).encode())


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Allocations of more than ROOM fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refuses(read: Callable[[], Any]) -> str:
    """The one clear line with which a reader refuses what it gets; empty where it takes it. Other errors pass."""
    try:
        with little_memory():
            read()
    except MegapolyError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 3000, message[:4000]  # some list all known keys
        return message
    return ""


FEWEST = 6  # attempts, on however slow a machine


def fuzz(attempt: Callable[[random.Random], Any], seconds: float) -> None:
    """Attempts with seeds 0, 1, .. for so long. What fails names its seed."""
    seed, end = 0, time.monotonic() + seconds
    while seed < FEWEST or time.monotonic() < end:
        try:
            attempt(random.Random(seed))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        seed += 1
