"""The entry point of every example: flags, checks, process group, run."""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megapoly.checks import check
from megapoly.cli import help_text, parse_flags, refuse_unknown
from megapoly.config import load_config, preset_names
from megapoly.data.corpus import prepare_corpus
from megapoly.data.plan_report import describe
from megapoly.errors import RESTART_STATUS, ConfigError, end_now, exit_on_error
from megapoly.log import Console
from megapoly.model.backends import choose_backends
from megapoly.model.count import flops_per_token, num_parameters
from megapoly.parallel.failure import ending_together
from megapoly.parallel.mesh import (
    Layout,
    Mesh,
    check_devices,
    die_with_launcher,
    init_mesh,
    leave,
    local_rank,
    prepare_host,
    world_size,
)
from megapoly.parallel.progress import Progress
from megapoly.plan.memory import describe_memory
from megapoly.sections import Config
from megapoly.train.begun import check_not_lost
from megapoly.train.loop import train
from megapoly.train.prepare import Prepared, prepare
from megapoly.train.replay import prepared_before, run_again
from megapoly.train.setup import (
    build_run,
    check_agreement,
    describe_pipeline,
    layer_split,
    only_writer,
    written_folders,
)


@dataclasses.dataclass(frozen=True)
class Invocation:
    """What a command line asks for."""

    name: str
    flags: dict[str, Any]
    is_dry_run: bool
    replayed: int | None = None

    def config(self) -> Config:
        """The configuration; it looks for held-out files, so that it is read anew once the data is there."""
        return load_config(self.name, self.flags)


def parse(argv: Sequence[str], gpu_preset: str, cpu_preset: str) -> Invocation:
    """Read `[--config NAME_OR_YAML] [--dry-run | --replay STEP] [--flag value ..]`; ConfigError for anything else."""
    flags, rest = parse_flags(argv)
    name, is_dry_run, replayed = None, False, None
    while rest:
        word = rest.pop(0)
        if word == "--config" or word.startswith("--config="):
            name = word.partition("=")[2] if "=" in word else (rest.pop(0) if rest else "")
            if not name:
                raise ConfigError(f"flag --config needs a value: a YAML file or one of {', '.join(preset_names())}")
        elif word == "--replay" or word.startswith("--replay="):
            text = word.partition("=")[2] if "=" in word else (rest.pop(0) if rest else "")
            if not text.isdecimal():
                raise ConfigError(f"flag --replay needs a step, not '{text}'")
            replayed = int(text)
        elif word == "--dry-run":
            is_dry_run = True
        elif word in ("-h", "--help"):
            if local_rank() == 0:
                print(help_text("usage: [--config NAME_OR_YAML] [--dry-run | --replay STEP] [--flag value ..]"))
            sys.exit(0)
        else:
            refuse_unknown([word], known=["config", "dry_run", "replay"])
    if is_dry_run and replayed is not None:
        raise ConfigError("--dry-run computes nothing, --replay a step: give one of them")
    if name is None:
        is_on_gpu = torch.cuda.is_available() and flags.get("distributed_backend") != "gloo"
        name = gpu_preset if is_on_gpu else cpu_preset
        Console(local_rank() == 0).say(f"no --config given: {name} ({'on CUDA' if is_on_gpu else 'on the CPU'})")
    return Invocation(name, flags, is_dry_run, replayed)


def provide_corpus(name: str, cfg: Config, corpus: Path) -> None:
    """Prepare the corpus that ships with the examples where a `tiny` preset has not got its data yet."""
    root = Path(cfg.data.data_root)
    is_tiny = name.endswith("tiny") and root == Path("data/tiny")
    if is_tiny and not (root / "manifest.json").is_file() and corpus.is_dir():
        # Whichever rank comes first prepares and prints; the others find the data ready.
        inputs = [str(path) for path in sorted(corpus.glob("*.jsonl"))]
        prepare_corpus(inputs, str(root), log=partial(print, flush=True), log_ready=False)


def dry_run(prepared: Prepared, world: int) -> None:
    """Print the resolved configuration, counts, curriculum and memory."""
    cfg, m = prepared.cfg, prepared.cfg.model
    layout = Layout.of(cfg)
    tp, pp, dp = layout.tp, layout.pp, world // layout.model
    count = num_parameters(m, prepared.vocab_size)
    pipeline = describe_pipeline(cfg, prepared.vocab_size, dp)
    print(cfg.to_yaml())
    lengths = list(dict.fromkeys(stage.seq_length for stage in prepared.plan.stages))
    work = [flops_per_token(dataclasses.replace(m, seq_length=n), prepared.vocab_size) / 1e9 for n in lengths]
    told = [
        f"{flops:.4g}" + (f" in sequences of {n:,}" if len(work) > 1 else "")
        for n, flops in zip(lengths, work, strict=True)
    ]
    print(f"parameters: {count:,}; {', '.join(told)} GFLOP a token")
    shared = f" x CP {layout.cp}" if layout.cp > 1 else ""
    split = " with sequence parallel" if cfg.parallel.sequence_parallel else ""
    print(f"layout: TP {tp}{split} x PP {pp} x DP {dp}{shared}; {pipeline}; {prepared.num_steps:,} steps")
    print(describe_memory(cfg, prepared.vocab_size, tuple(layer_split(cfg, prepared.vocab_size)), world))
    print(describe(prepared.plan))


def run_on(prepared: Prepared, mesh: Mesh, progress: Progress) -> bool:
    """Train as the only job that writes to the directories of the run; False where a signal stopped it."""
    with contextlib.ExitStack() as locks:
        for folder in written_folders(prepared.cfg):
            locks.enter_context(only_writer(folder, mesh.is_main))
        return train(build_run(prepared, mesh, progress))


def main(gpu_preset: str, cpu_preset: str, corpus: Path, argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; `gpu_preset` and `cpu_preset` stand in for a missing --config."""
    is_joined = False

    def run_it() -> None:
        nonlocal is_joined
        die_with_launcher()
        asked = parse(sys.argv[1:] if argv is None else argv, gpu_preset, cpu_preset)
        cfg = asked.config()
        parallel = cfg.parallel
        world = world_size()
        if asked.is_dry_run and world == 1:  # without a launcher: the smallest world that the layout fits
            world = Layout.of(cfg).model
        else:
            prepare_host(parallel)
            check_devices(parallel)
            is_on_gpu = torch.cuda.is_available() and parallel.distributed_backend != "gloo"
            choose_backends(cfg.precision, torch.device("cuda" if is_on_gpu else "cpu"))
        check(cfg, world)
        provide_corpus(asked.name, cfg, corpus)
        prepared = prepare(asked.config(), world, torch.cuda.is_available(), writes=asked.replayed is None)
        if asked.is_dry_run:
            if local_rank() == 0:
                dry_run(prepared, world)
            return
        if asked.replayed is not None:
            prepared = prepared_before(prepared, asked.replayed)
        elif prepared.start_step >= prepared.num_steps:
            if local_rank() == 0:
                whose = prepared.cfg.logging.run_dir if prepared.is_resume else prepared.cfg.checkpoint.load
                print(
                    f"{whose} is finished ({prepared.start_step} steps): nothing to do; "
                    "give another --run-dir to start anew, or longer stages to go on"
                )
            return
        else:
            check_not_lost(prepared)
        mesh = init_mesh(cfg)
        is_joined = True  # from here on a rank may meet what the others do not
        progress, run_dir = Progress(), prepared.cfg.logging.run_dir
        with ending_together(mesh, parallel.distributed_timeout_minutes, progress, run_dir):
            check_agreement(prepared, mesh)
            if asked.replayed is None:
                is_finished = run_on(prepared, mesh, progress)
            else:
                is_finished = run_again(build_run(prepared, mesh, progress), asked.replayed)
        leave(mesh)
        end_now(0 if is_finished else RESTART_STATUS)

    exit_on_error(run_it, speaks=lambda: is_joined or local_rank() == 0, is_logged=True)()
