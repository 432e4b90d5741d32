"""What megapoly costs on the host: python kernels/bench/host.py [--only overhead] [--rounds 15] [--json FILE]

A training step of megapoly (its loader, model, gradient buffers, clipping, sharded AdamW, losses by source) beside the
same model in `transformers` with torch's clipping and fused AdamW; fp32, on the CPU even where a GPU is. The two are
measured in turn, A B A B .., each in processes of its own that wait meanwhile, and the figure is the median of the
ratios of neighbours, so that whatever else the machine does meets both. Absolute figures stand beside it only.

overhead    a model so small that little but the host's work is left; the peer trains under DDP (gloo, 1 process)
throughput  4 layers x 256, sequence 256, vocabulary 8,192, 2,048 tokens a step; TP 2 without sequence parallel, since
            gloo's reduce-scatter is an all-reduce of which a part is kept
memory      peak of resident memory (VmHWM, torch itself included) of a process at 256,000 entries, 1,024 tokens a step;
            TP 2 with sequence parallel
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from results import environment, write_json

NOT_RUNNABLE = 2
PARTS = ["overhead", "throughput", "memory"]
CLIP, LR, BETAS, EPS, DECAY = 1.0, 1e-3, (0.9, 0.95), 1e-8, 0.1
ROTARY = {"position_embedding_type": "rope", "untie_embeddings_and_output_weights": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_neox": ROTARY | {"rotary_percent": 0.25, "activation": "gelu", "parallel_residual": True},
    "llama": ROTARY | {"normalization": "RMSNorm", "activation": "swiglu", "add_bias_linear": False},
}


@dataclass(frozen=True)
class Sizes:
    """A model and the batch of a step."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    length: int
    sequences: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequences * self.length


OVERHEAD = Sizes(layers=4, hidden=64, heads=4, vocab=512, length=32, sequences=2)
SMALL = Sizes(layers=4, hidden=256, heads=8, vocab=8192, length=256, sequences=8)
WIDE = replace(SMALL, vocab=256_000, sequences=4)
SMOKE = Sizes(layers=2, hidden=32, heads=4, vocab=128, length=16, sequences=4)


@dataclass(frozen=True)
class Contestant:
    """Who trains what, on tp x pp processes of `threads` threads, `micro_batch` sequences at a time (0: all)."""

    name: str
    family: str
    sizes: Sizes
    tp: int = 1
    pp: int = 1
    threads: int = 1
    micro_batch: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.tp * self.pp


@dataclass(frozen=True)
class Race:
    """megapoly beside its peer: the least ratio of speed, or the most memory a process, that it is held to."""

    part: str
    what: str
    ours: Contestant
    peer: Contestant
    least: float = 0.0
    most_gb: float = 0.0


def races(options: argparse.Namespace) -> list[Race]:
    """All that is measured."""

    def pair(part: str, what: str, family: str, sizes: Sizes, threads: int = 1, **held: float) -> Race:
        peer = "transformers + DDP" if part == "overhead" else "transformers"
        ours = Contestant("megapoly", family, sizes, options=options.set)
        return Race(part, what, ours, Contestant(peer, family, sizes, threads=threads), **held)

    sizes = (SMOKE,) * 3 if options.smoke else (OVERHEAD, SMALL, WIDE)
    found = []
    for family in options.families:
        found.append(pair("overhead", "1 process", family, sizes[0], least=1.0))
        alone = pair("throughput", "1 process", family, sizes[1], least=1.0)
        tensor = pair("throughput", "TP 2, peer 2 threads", family, sizes[1], 2, least=0.95)
        pipeline = pair("throughput", "PP 2, peer 2 threads", family, sizes[1], 2, least=0.75)
        found += [alone, replace(tensor, ours=replace(tensor.ours, tp=2))]
        found.append(replace(pipeline, ours=replace(pipeline.ours, pp=2, micro_batch=1)))
    family = options.families[-1]
    wide = pair("memory", "1 process", family, sizes[2], most_gb=4.1)
    split = replace(wide.ours, tp=2, options={"sequence_parallel": True} | options.set)
    found += [wide, replace(wide, what="TP 2", ours=split, most_gb=2.3)]
    return [race for race in found if race.part in options.only]


# ------------------------------------------------------------------------------------------- in the measured processes


def megapoly_step(who: Contestant, folder: Path) -> Callable[[int], object]:
    """megapoly's own training step over files of random tokens."""
    from megapoly.config import load_config
    from megapoly.data.curriculum import make_plan, open_sources
    from megapoly.parallel.mesh import Layout, make_mesh, single_process_mesh
    from megapoly.sections import CurriculumConfig, Source, Stage
    from megapoly.train.prepare import Prepared, resolve, run_length
    from megapoly.train.setup import build_run
    from megapoly.train.step import train_step

    s = who.sizes
    flags = FAMILIES[who.family] | {
        "num_layers": s.layers, "hidden_size": s.hidden, "num_attention_heads": s.heads, "seq_length": s.length,
        "vocab_size": s.vocab, "micro_batch_size": who.micro_batch or s.sequences, "global_batch_size": s.sequences,
        "tensor_model_parallel_size": who.tp, "pipeline_model_parallel_size": who.pp,
        "lr": LR, "lr_decay_style": "constant", "lr_warmup_iters": 0, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1],
        "adam_eps": EPS, "weight_decay": DECAY, "clip_grad": CLIP, "run_dir": str(folder / "run"),
    }  # fmt: skip
    cfg = resolve(load_config("tiny", flags | who.options), has_cuda=False)
    sources = [Source(name="en", language="en", paths=[str(tokens_file(folder, s.vocab))])]
    stages = [Stage(name="all", tokens=10**6 * s.tokens, non_english_share=0.0)]
    cfg = replace(cfg, data=replace(cfg.data, sources=sources), curriculum=CurriculumConfig(stages=stages))
    streams = open_sources(cfg, s.vocab)
    plan = make_plan(cfg, [stream.num_tokens for stream in streams])
    prepared = Prepared(cfg, None, s.vocab, streams, [None], plan, run_length(cfg, plan))
    cpu = torch.device("cpu")
    mesh = single_process_mesh(cpu) if who.ranks == 1 else make_mesh(Layout(tp=who.tp, pp=who.pp), cpu)
    run = build_run(prepared, mesh)
    return lambda step: train_step(run, step)


def tokens_file(folder: Path, vocab: int) -> Path:
    """The prefix of the token file for a size of the vocabulary."""
    return folder / f"tokens_{vocab}"


def write_tokens(folder: Path, vocab: int) -> None:
    """A token file that the longest step reads several times."""
    from megapoly.data.indexed import IndexedDatasetWriter

    with IndexedDatasetWriter(str(tokens_file(folder, vocab)), vocab) as writer:
        ids = torch.randint(0, vocab, (64, 1000), generator=torch.Generator().manual_seed(vocab))
        for document in ids.numpy():
            writer.add_document(document)
        writer.finalize()


def transformers_step(who: Contestant) -> Callable[[int], object]:
    """A causal language model of transformers with its own loss; its batches lie in memory."""
    import transformers

    s, is_gpt2 = who.sizes, who.family == "gpt2"
    common = {"vocab_size": s.vocab, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
    if is_gpt2:
        config: Any = transformers.GPT2Config(
            n_positions=s.length, n_embd=s.hidden, n_layer=s.layers, n_head=s.heads, activation_function="gelu_new",
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common,
        )  # fmt: skip
    else:
        kind = transformers.LlamaConfig if who.family == "llama" else transformers.GPTNeoXConfig
        config = kind(
            max_position_embeddings=s.length, hidden_size=s.hidden, num_hidden_layers=s.layers,
            num_attention_heads=s.heads, intermediate_size=4 * s.hidden, **common,
        )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    called = torch.nn.parallel.DistributedDataParallel(model) if "DDP" in who.name else model
    optimizer = torch.optim.AdamW(model.parameters(), LR, BETAS, EPS, DECAY, fused=True)
    batches = [torch.randint(0, s.vocab, (s.sequences, s.length)) for _ in range(4)]

    def step(number: int) -> None:
        ids = batches[number % len(batches)]
        called(input_ids=ids, labels=ids).loss.backward()  # it shifts the labels itself
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def serve(who: Contestant, rank: int, folder: Path, store: str, asked: Connection) -> None:
    """Build a contestant; then answer each number of steps asked for with (seconds a step, peak bytes), until None."""
    torch.set_num_threads(who.threads)
    try:
        if who.ranks > 1 or "DDP" in who.name:
            rendezvous = dist.FileStore(store, who.ranks)
            dist.init_process_group(
                "gloo", rank=rank, world_size=who.ranks, store=rendezvous, timeout=timedelta(minutes=10)
            )
        step = megapoly_step(who, folder) if who.name == "megapoly" else transformers_step(who)
        done = 0
        asked.send(None)
        while (count := asked.recv()) is not None:
            begin = time.perf_counter()
            for number in range(done + 1, done + count + 1):
                step(number)
            done += count
            asked.send(((time.perf_counter() - begin) / count, peak_bytes()))
    except EOFError:  # the process that measures is gone
        sys.exit(1)
    except Exception:  # whatever it is, the process that measures reports it and goes on with the others
        asked.send(traceback.format_exc())


def peak_bytes() -> int:
    """The most memory that was ever resident of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


# ----------------------------------------------------------------------------------------- in the process that measures


class Failed(Exception):
    """A contestant that stopped; the message is its traceback."""


class Team:
    """The processes of a contestant, ready to step; they wait while nothing is asked of them."""

    def __init__(self, who: Contestant, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        os.environ["OMP_NUM_THREADS"] = str(who.threads)
        self.who, self.peak = who, 0
        self._ends: list[Connection] = []
        self._processes = []
        store = tempfile.mktemp(dir=folder)  # noqa: S306  # FileStore makes it, in a folder of our own
        for rank in range(who.ranks):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(who, rank, folder, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(mine)
            self._processes.append(process)
        self._answers()

    def _answers(self) -> list[Any]:
        answers = []
        for end in self._ends:
            try:
                answers.append(end.recv())
            except EOFError:
                raise Failed(f"{self.who.name}: a process ended") from None
        for answer in answers:
            if isinstance(answer, str):
                raise Failed(answer)
        return answers

    def seconds(self, steps: int) -> float:
        """Seconds of a step, mean over so many, on the slowest rank."""
        for end in self._ends:
            end.send(steps)
        answers = self._answers()
        self.peak = max(peak for _, peak in answers)
        return max(seconds for seconds, _ in answers)

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


@contextmanager
def team(who: Contestant, folder: Path) -> Iterator[Team]:
    """The processes of a contestant, ended at the end."""
    ready = Team(who, folder)
    try:
        yield ready
    finally:
        ready.close()


def run_race(race: Race, folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Ratio, and medians of both sides; memory is taken of one side after the other, since both would not fit."""
    told: dict[str, Any] = {
        "part": race.part, "what": race.what, "family": race.ours.family, "peer": race.peer.name,
        "least": race.least, "most_gb": race.most_gb, "note": "", "met": None,
    }  # fmt: skip
    try:
        if race.part == "memory":
            for key, who in (("ours_gb", race.ours), ("peer_gb", race.peer)):
                with team(who, folder) as one:
                    one.seconds(3)
                    told[key] = one.peak / 1e9
            told["met"] = told["ours_gb"] < race.most_gb
            told["ratio"] = told["peer_gb"] / told["ours_gb"]
        else:
            with team(race.ours, folder) as ours, team(race.peer, folder) as peer:
                told |= _alternate(ours, peer, rounds, seconds)
            told["met"] = told["ratio"] >= race.least
    except Failed as failure:
        told["note"] = str(failure).strip().splitlines()[-1]
        print(failure, file=sys.stderr)
    return told


def _alternate(ours: Team, peer: Team, rounds: int, seconds: float) -> dict[str, Any]:
    for one in (ours, peer):
        one.seconds(3)
    steps = [max(1, round(seconds / one.seconds(1))) for one in (ours, peer)]
    pairs = [(ours.seconds(steps[0]), peer.seconds(steps[1])) for _ in range(rounds)]
    ratios = sorted(theirs / mine for mine, theirs in pairs)
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    tokens = ours.who.sizes.tokens
    return {
        "ratio": statistics.median(ratios), "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4], "ours_ms": 1e3 * mine, "peer_ms": 1e3 * theirs,
        "ours_tokens_per_second": tokens / mine, "peer_tokens_per_second": tokens / theirs,
        "ours_steps": steps[0], "peer_steps": steps[1], "rounds": rounds,
    }  # fmt: skip


def row(told: dict[str, Any]) -> str:
    """A result as a line of text."""
    head = f"{told['part']:<11}{told['family']:<9}{told['what']:<22}"
    if told["note"]:
        return head + told["note"]
    verdict = "met" if told["met"] else "NOT MET"
    if told["part"] == "memory":
        ours, peer = told["ours_gb"], told["peer_gb"]
        return f"{head}{ours:6.2f} GB a process; {told['peer']} {peer:.2f} GB; below {told['most_gb']} GB: {verdict}"
    spread = f"{told['ratio_low']:.3f} .. {told['ratio_high']:.3f}"
    return (
        f"{head}{told['ratio']:6.3f} ({spread}) of {told['peer']}, at least {told['least']:g}: {verdict}   "
        f"[{told['ours_ms']:.1f} / {told['peer_ms']:.1f} ms, "
        f"{told['ours_tokens_per_second']:.0f} / {told['peer_tokens_per_second']:.0f} tokens/s]"
    )


def main() -> int:
    """Measure, print and write; the exit status."""
    parser = argparse.ArgumentParser(description="Times megapoly's training step on the CPU beside transformers.")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--rounds", type=int, default=11, help="pairs of measurements")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement, at least one step")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of megapoly")
    parser.add_argument("--json", type=Path, help="write the results to this file, as they come")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; measures nothing")
    options = parser.parse_args()
    options.set = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in options.set)}
    missing = [name for name in ("transformers", "megapoly", "numpy", "yaml") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{Path(__file__).name}: needs {', '.join(missing)}; pip install -e '.[hf]', and run by make bench-host")
        return NOT_RUNNABLE
    head = environment(True) | {"smoke": options.smoke, "cores": len(os.sched_getaffinity(0))}
    print(f"torch {head['torch']} on {head['cores']} cores; speed of megapoly over the peer's (middle half)")
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-host-") as name:
        found = races(options)
        for vocab in {race.ours.sizes.vocab for race in found}:
            write_tokens(Path(name), vocab)
        for race in found:
            results.append(run_race(race, Path(name), options.rounds, options.seconds))
            print(row(results[-1]), flush=True)
            if options.json is not None:  # each time: what was measured survives if this is killed
                write_json(options.json, head | {"results": results})
    return 1 if any(told["note"] for told in results) else 0


if __name__ == "__main__":
    sys.exit(main())
