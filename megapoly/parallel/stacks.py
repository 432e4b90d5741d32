"""Where a rank stands, read from its Python stacks: in a line, and in whole for the report of a hang."""

import itertools
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from megapoly.parallel.collectives import Pending
from megapoly.parallel.mesh import Mesh

WATCHERS = ("watch", "guard")  # threads of the watch over a run, which stand nowhere
Frames = list[tuple[FrameType, int]]  # with the line in each, outermost first


def frames_of_all_threads() -> Frames:
    """The main thread's first: on a GPU, backward passes run in another."""
    return [pair for _, top in _stacks() for pair in [*traceback.walk_stack(top)][::-1]]


def _stacks() -> list[tuple[int, FrameType]]:
    """The innermost frame of each thread, the main one's first, but for the caller and the watch."""
    left_out = {thread.ident for thread in threading.enumerate() if thread.name in WATCHERS} | {threading.get_ident()}
    main = threading.main_thread().ident
    stacks = sorted(sys._current_frames().items(), key=lambda entry: entry[0] != main)
    return [(ident, top) for ident, top in stacks if ident not in left_out]


def describe(frames: Frames, mesh: Mesh) -> str:
    """Where a rank stands: step and phase, the collective and its axis as far as they show, the line of our code."""
    names = [frame.f_code.co_name for frame, _ in frames]
    ours = [pair for pair in frames if _is_ours(pair[0])]
    words = []
    for (frame, _), (following, _) in itertools.pairwise(ours):
        if frame.f_code.co_name == "train_step":
            phase = next((name for name in ("backward", "forward") if name in names), following.f_code.co_name)
            words = [f"train step {frame.f_locals.get('step')}", phase]
    words.append(collective(frames, mesh))
    frame, line = ours[-1] if ours else frames[-1]
    return (
        f"{', '.join(filter(None, words))} ({frame.f_code.co_qualname}, {Path(frame.f_code.co_filename).name}:{line})"
    )


def _is_ours(frame: FrameType) -> bool:
    return "megapoly" in Path(frame.f_code.co_filename).parts


def collective(frames: Frames, mesh: Mesh) -> str:
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


def stacks_of_this_rank() -> str:
    """The Python stacks of the main thread and of every other one that runs code of ours, but of the caller."""
    texts = []
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, top in _stacks():
        is_main = ident == threading.main_thread().ident
        if not (is_main or any(_is_ours(f) for f, _ in traceback.walk_stack(top))):
            continue
        texts.append(f"  thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(top))}")
    return "".join(texts)


def report(title: str, names: dict[int, str], entries: dict[int, dict[str, Any]]) -> str:
    """What a person reads of a hang: a line for each rank, then the stacks; ranks with the same ones share them.

    `entries` has for each rank that answered its `line` and `stacks`; ranks are named by `names`.
    """
    lines = [title]
    alike: dict[str, list[int]] = {}
    for rank, name in sorted(names.items()):
        if rank in entries:
            alike.setdefault(entries[rank]["stacks"], []).append(rank)
            lines.append(f"  {name}: {entries[rank]['line']}")
        else:
            lines.append(f"  {name}: gives no sign of life")
    for stacks, ranks in alike.items():
        lines += [f"stacks of rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}:", stacks.rstrip("\n")]
    return "\n".join(lines) + "\n"
