#!/usr/bin/env python3
"""The whole way once: corpus, tokenizer, tokens, 3D-parallel training, samples, export, check (`make pretrain`)."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from megapoly.arguments import ArgumentParser
from megapoly.cli import parse_flags
from megapoly.data.corpus import prepare_corpus
from megapoly.errors import exit_on_error

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = {
    "en": "The old clockmaker", "de": "Der Zug nach", "es": "El río", "ru": "Вечером мы", "zh": "图书馆",
    "ko": "아침에 우리는", "th": "ในตอนเช้า", "ar": "في الصباح", "fr": "Le matin", "ja": "朝になると",
}  # fmt: skip


def layout_flags() -> tuple[int, list[str]]:
    """(ranks, flags): one rank a GPU, or 8 gloo ranks on a CPU, as TP 2 x PP 2 x DP as far as that divides."""
    ranks = torch.cuda.device_count() or 8
    tp = 2 if ranks % 2 == 0 else 1
    pp = 2 if ranks % (2 * tp) == 0 else 1
    dp = ranks // (tp * pp)
    batch = 8 if 8 % dp == 0 else dp
    sizes = {
        "tensor-model-parallel-size": tp,
        "pipeline-model-parallel-size": pp,
        "global-batch-size": batch,
        "micro-batch-size": 2 if batch % (2 * dp) == 0 else 1,
    }
    return ranks, [word for name, size in sizes.items() for word in (f"--{name}", str(size))]


def memory_of(pid: int) -> int:
    """Proportional set size of a process and all below it, in bytes (Linux; pages that they share count once)."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0  # it has just ended
    return int(rollup.split("\nPss:")[1].split()[0]) * 1024 + sum(memory_of(int(child)) for child in below)


def step(title: str, command: list[str]) -> int:
    """Run a command and end with its status where it fails; returns the most memory seen, in bytes."""
    print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
    process, most = subprocess.Popen(command), 0  # noqa: S603
    while True:
        try:
            status = process.wait(timeout=2)
            break
        except subprocess.TimeoutExpired:
            most = max(most, memory_of(os.getpid()))
        except KeyboardInterrupt:
            process.wait()  # Ctrl-C reached it as well; a training saves first
            raise
    if status:
        sys.exit(status)
    return most


def report_losses(metrics: Path) -> None:
    """Mean training loss of the first 5 and the last 10 steps of each stage, English and other languages."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        parts = []
        for name, key in (("English", "loss_english"), ("other", "loss_non_english")):
            losses = [row[key] for row in rows if row["stage"] == stage and row.get(key) is not None]
            if losses:
                first, last = losses[:5], losses[-10:]
                parts.append(f"{name} {sum(first) / len(first):.2f} -> {sum(last) / len(last):.2f}")
        print(f"{stage}, first 5 -> last 10 steps: {', '.join(parts)}")


@exit_on_error
def main() -> None:
    """Prepare the text, train on it, sample from the result, export it and load the export."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", nargs="+", help="JSONL files of your own, {text, lang} a line (default: examples/data)"
    )
    args, flags = parser.parse_known_args()
    begin = time.time()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.data:
        name = "own-" + hashlib.blake2b("\0".join(args.data).encode(), digest_size=4).hexdigest()
        inputs, data, config = args.data, Path("data") / name, str(Path("data") / name / "config.yaml")
    else:
        inputs, data, config = sorted(map(str, (ROOT / "examples/data").glob("*.jsonl"))), Path("data/tiny"), "tiny"
    print("== corpus, tokenizer, tokens", flush=True)
    prepare_corpus(inputs, str(data))
    manifest = (data / "manifest.json").read_bytes()
    # The run's name follows the prepared data, so that changed text starts a run anew instead of spoiling an old one.
    run = parse_flags(flags)[0].get(
        "run_dir", f"runs/{data.name}-{hashlib.blake2b(manifest, digest_size=4).hexdigest()}"
    )
    ranks, layout = layout_flags()
    torchrun = [sys.executable, "-m", "megapoly.train.launch", "--standalone", "--nproc-per-node", str(ranks)]
    script = [str(ROOT / "examples/pretrain_polylm.sh"), "--config", config, *layout, *flags, "--run-dir", run]
    most = step("training", [*torchrun, *script])
    if "--dry-run" in flags:
        return
    report_losses(Path(run) / "metrics.jsonl")
    python, tools = sys.executable, ROOT / "tools"
    languages = json.loads(manifest)["languages"]
    prompts = [prompt for language, prompt in PROMPTS.items() if language in languages] or list(PROMPTS.values())[:3]
    step("samples (prompt | continuation)", [python, str(tools / "generate.py"), "--load", run, "--prompt", *prompts])
    convert = [python, str(tools / "convert_to_hf.py"), "--load", run, "--save", f"{run}/hf", "--check"]
    step("export to Hugging Face", convert)
    memory = f", at most {most / 1e9:.1f} GB of memory in all processes" if most else ""
    print(f"\ndone in {time.time() - begin:.0f} s{memory}: {run}/metrics.jsonl, {run}/checkpoints, {run}/hf")


if __name__ == "__main__":
    main()
