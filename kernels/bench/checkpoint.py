"""What checkpoints cost: python kernels/bench/checkpoint.py [--ranks 2] [--gigabytes 1] [--rounds 5] [--folder DIR]

A small model whose state has the asked-for size trains on CPU ranks (gloo) and is saved by megapoly, asynchronously and
synchronously, by torch.save of every rank's state (without fsync), and by torch.distributed.checkpoint's async_save
(its default storage). They come in turn, A B C D A B .., and the figures are medians over the rounds.

stall      seconds that a save keeps the training loop
beside     time of a training step while a save is written, over that of a step without one
bytes      bytes written over bytes of the state
save       bandwidth of a synchronous save over that of plain writers, as many as ranks, each with an fsync
load       bandwidth of a load, checksums included, over that of plain readers of the files that the plain writers wrote
           in the same round; the page cache is asked to forget both first (posix_fadvise)
memory     host memory that asynchronous saving takes, over the state

In saves and loads plain writers and readers go first in every other round.
"""

import argparse
import contextlib
import multiprocessing
import os
import queue
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from results import environment, write_json

LEAST_SHARE = 0.8
BLOCK = 16 << 20


def state_bytes(layers: int, hidden: int, vocab: int) -> int:
    """Bytes of master weights and two moments, about."""
    return 12 * (layers * 12 * hidden * hidden + vocab * hidden)


def prepared_run(rank: int, options: argparse.Namespace, folder: Path) -> Any:
    """A run of this rank on random tokens, data parallel over all ranks."""
    from megapoly.config import load_config
    from megapoly.data.curriculum import make_plan, open_sources
    from megapoly.data.indexed import IndexedDatasetWriter
    from megapoly.parallel.mesh import Layout, make_mesh, single_process_mesh
    from megapoly.sections import CurriculumConfig, Source, Stage
    from megapoly.train.prepare import Prepared, resolve, run_length
    from megapoly.train.setup import build_run

    vocab, hidden, length = 1024, options.hidden, 64
    layers = max(1, round((options.gigabytes * 1e9 - state_bytes(0, hidden, vocab)) / state_bytes(1, hidden, 0)))
    prefix = folder / "tokens"
    if rank == 0:
        with IndexedDatasetWriter(str(prefix), vocab) as writer:
            writer.add_document(torch.randint(0, vocab, (20_000,)).numpy())
            writer.finalize()
    if options.ranks > 1:
        dist.barrier()
    flags = {
        "num_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 64, "seq_length": length,
        "vocab_size": vocab, "micro_batch_size": 1, "global_batch_size": options.ranks, "bf16": True,
        "run_dir": str(folder / "run"),
    }  # fmt: skip
    cfg = resolve(load_config("tiny", flags), has_cuda=False)
    sources = [Source(name="en", language="en", paths=[str(prefix)])]
    stages = [Stage(name="all", tokens=10**7, non_english_share=0.0)]
    cfg = replace(cfg, data=replace(cfg.data, sources=sources), curriculum=CurriculumConfig(stages=stages))
    streams = open_sources(cfg, vocab)
    plan = make_plan(cfg, [stream.num_tokens for stream in streams])
    prepared = Prepared(cfg, None, vocab, streams, [None], plan, run_length(cfg, plan))
    cpu = torch.device("cpu")
    return build_run(prepared, single_process_mesh(cpu) if options.ranks == 1 else make_mesh(Layout(), cpu))


class Bench:
    """One rank's measurements; `told` collects lists of figures by name."""

    def __init__(self, rank: int, options: argparse.Namespace, folder: Path) -> None:
        from megapoly.checkpoint.save import Saver
        from megapoly.train.step import train_step

        self.rank, self.options, self.folder = rank, options, folder
        self.run = prepared_run(rank, options, folder)
        self.train_step, self.step = train_step, 0
        checkpoint = self.run.cfg.checkpoint
        self.savers = {
            name: Saver(
                replace(checkpoint, save=str(folder / name), async_save=name == "async"), self.run.optimizer, None
            )
            for name in ("async", "sync")
        }
        adam = self.run.optimizer
        self.state = {"master": adam.master, "exp_avg": adam.exp_avg.flat, "exp_avg_sq": adam.exp_avg_sq.flat}
        self.mine = sum(p.tensor.nbytes for p in self.savers["sync"].pieces)
        self.group = dist.new_group(backend="gloo") if options.ranks > 1 else None
        self.told: dict[str, list[float]] = {}
        self.rounds = 0

    def tell(self, name: str, value: float) -> None:
        """Keep a figure."""
        self.told.setdefault(name, []).append(value)

    def together(self) -> None:
        """Wait for all ranks."""
        if self.options.ranks > 1:
            dist.barrier()

    def timed(self, act: Callable[[], object]) -> float:
        """Seconds of an act that all ranks begin and end together."""
        self.together()
        begin = time.perf_counter()
        act()
        self.together()
        return time.perf_counter() - begin

    def steps(self) -> float:
        """Seconds of a training step."""
        self.step += 1
        return self.timed(lambda: self.train_step(self.run, self.step))

    def round(self) -> None:
        """Everything once."""
        alone = statistics.median(self.steps() for _ in range(3))
        self.tell("step", alone)
        saver = self.savers["async"]
        self.together()
        saver.save(self.step, self.run.checkpoint_state(self.step))
        self.tell("stall async", saver.stall)
        during = []
        while self.on_any_rank(saver.is_writing):
            during.append(self.steps())
        if during:
            self.tell("beside", statistics.median(during) / alone)
        saver.wait()

        saver = self.savers["sync"]
        seconds = self.in_turn(
            lambda: saver.save(self.step, self.run.checkpoint_state(self.step)),
            self.write_plainly,
        )
        self.tell("stall sync", saver.stall)
        self.tell_share("save", *seconds)
        self.load(self.folder / "sync")
        self.together()
        if self.rank == 0:
            shutil.rmtree(self.folder / "raw")
        self.peers()
        self.rounds += 1

    def in_turn(self, ours: Callable[[], object], plain: Callable[[], object]) -> tuple[float, float]:
        """Seconds of both, now one first and now the other: what comes later finds the disk otherwise."""
        if self.rounds % 2:
            return self.timed(ours), self.timed(plain)
        seconds = self.timed(plain)
        return self.timed(ours), seconds

    def tell_share(self, name: str, ours: float, plain: float) -> None:
        """Keep a bandwidth, and its share of the plain one."""
        self.tell(f"{name} share", plain / ours)
        self.tell(name, self.mine / ours / 1e9)

    def on_any_rank(self, mine: bool) -> bool:
        """Whether something holds on any rank."""
        flag = torch.tensor([int(mine)])
        if self.options.ranks > 1:
            dist.all_reduce(flag)
        return bool(flag)

    def write_plainly(self) -> None:
        """This rank's bytes into one file, then fsync."""
        (self.folder / "raw").mkdir(exist_ok=True)
        block = memoryview(bytearray(os.urandom(BLOCK)))
        with (self.folder / "raw" / str(self.rank)).open("wb", buffering=0) as file:
            left = self.mine
            while left:
                left -= file.write(block[:left])
            os.fsync(file.fileno())

    def load(self, root: Path) -> None:
        """A load and plain reads of as many bytes, both from the disk."""
        from megapoly.checkpoint.load import CheckpointReader, load_checkpoint

        reader = CheckpointReader.open(root)
        raw = self.folder / "raw" / str(self.rank)
        forget(reader.folder / f"shard_{self.rank:05d}.safetensors")
        forget(raw)
        self.tell_share(
            "load", *self.in_turn(lambda: load_checkpoint(reader, self.run.optimizer), lambda: read_plainly(raw))
        )

    def peers(self) -> None:
        """torch.save and DCP's async_save of the same state."""
        target = self.folder / "torch"
        target.mkdir(exist_ok=True)
        self.tell("stall torch.save", self.timed(lambda: torch.save(self.state, target / f"{self.rank}.pt")))
        state = {f"{name}.{self.rank}": tensor for name, tensor in self.state.items()}
        self.together()
        begin = time.perf_counter()
        future = dcp.async_save(state, checkpoint_id=str(self.folder / "dcp"), process_group=self.group)
        self.tell("stall dcp.async_save", time.perf_counter() - begin)
        future.result()  # type: ignore[union-attr]
        self.together()
        if self.rank == 0:
            for name in ("dcp", "torch"):
                shutil.rmtree(self.folder / name)


def forget(path: Path) -> None:
    """Put a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def read_plainly(path: Path) -> None:
    """All bytes of a file, block by block."""
    block = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def measure(rank: int, options: argparse.Namespace, folder: Path, answers: Any) -> None:
    """One rank: warm up, then the rounds."""
    torch.set_num_threads(1)
    if options.ranks > 1:
        store = dist.FileStore(str(folder / "store"), options.ranks)
        dist.init_process_group("gloo", rank=rank, world_size=options.ranks, store=store, timeout=timedelta(minutes=10))
    bench = Bench(rank, options, folder)
    bench.round()  # files, memory and threads are there
    bench.told.clear()
    for _ in range(options.rounds):
        bench.round()
    folder_of = next((folder / "sync").glob("step_*"))
    written = sum(path.stat().st_size for path in folder_of.iterdir())
    memory = bench.savers["async"].copy
    assert memory is not None
    answers.put((rank, bench.told, bench.mine, memory.memory.nbytes, written))
    if options.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> int:
    """Measure, print, and tell by the status whether the bounds are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the state of all ranks, about")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk that is measured (default: where temporary files go)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: whether it runs, no figures to keep")
    options = parser.parse_args()
    if options.smoke:
        options.gigabytes, options.hidden, options.rounds = 0.01, 64, 1
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        answers = context.Queue()
        ranks = [
            context.Process(target=measure, args=(rank, options, Path(name), answers), daemon=True)
            for rank in range(options.ranks)
        ]
        for process in ranks:
            process.start()
        told = answers_of(ranks, answers)
        for process in ranks:
            process.join()
    return report(options, sorted(told, key=lambda one: one[0]))


def answers_of(ranks: list[Any], answers: Any, seconds: float = 1.0) -> list[Any]:
    """What each rank tells; SystemExit with one line as soon as a rank has ended otherwise, looked for so often."""
    told: list[Any] = []
    while len(told) < len(ranks):
        dead = [rank for rank, process in enumerate(ranks) if process.exitcode]
        if dead:
            for process in ranks:
                process.kill()
            raise SystemExit(f"rank {dead[0]} ended with status {ranks[dead[0]].exitcode}: nothing was measured")
        with contextlib.suppress(queue.Empty):
            told.append(answers.get(timeout=seconds))
    return told


def report(options: argparse.Namespace, told: list[Any]) -> int:
    """Print the figures; a figure of several ranks is the slowest one's."""
    state, memory, written = sum(one[2] for one in told), sum(one[3] for one in told), told[0][4]
    figures = {name: [statistics.median(one[1][name]) for one in told] for name in told[0][1]}
    print(f"{options.ranks} ranks, {state / 1e9:.2f} GB of state, {options.rounds} rounds")
    print(f"  training step                 {max(figures['step']):8.3f} s")
    for name in ("async", "sync", "torch.save", "dcp.async_save"):
        print(f"  stall of {name:<20} {max(figures[f'stall {name}']):8.3f} s")
    if "beside" in figures:  # no step fell beside a save that was written before the next one began
        print(f"  step beside a save over alone {max(figures['beside']):8.2f}")
    print(f"  bytes written over state      {written / state:8.4f}")
    for name in ("save", "load"):
        rate, share = sum(figures[name]), min(figures[f"{name} share"])
        plain = {"save": "writes", "load": "reads"}[name]
        print(f"  {name} of all ranks             {rate:8.2f} GB/s, {share:.2f} of plain {plain}")
    print(f"  host memory of async over state {memory / state:6.2f}")
    shares = {name: min(figures[f"{name} share"]) for name in ("save", "load")}
    if options.json:
        rows = [{"rank": one[0], "told": one[1], "state": one[2], "copy": one[3], "written": one[4]} for one in told]
        write_json(options.json, environment(options.smoke) | {"results": rows})
    missed = [f"{name} {share:.2f}" for name, share in shares.items() if share < LEAST_SHARE]
    if missed:
        print(f"below {LEAST_SHARE} of plain writes or reads: {', '.join(missed)}")
    return 1 if missed and not options.smoke else 0


if __name__ == "__main__":
    sys.exit(main())
