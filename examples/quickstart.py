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


def step(title: str, command: list[str]) -> None:
    """Run a command and end with its status where it fails."""
    print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
    status = subprocess.run(command, check=False).returncode  # noqa: S603
    if status:
        sys.exit(status)


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
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = [str(ROOT / "examples/pretrain_polylm.sh"), "--config", config, *layout, *flags, "--run-dir", run]
    step("training", [*torchrun, *script])
    if "--dry-run" in flags:
        return
    python, tools = sys.executable, ROOT / "tools"
    languages = json.loads(manifest)["languages"]
    prompts = [prompt for language, prompt in PROMPTS.items() if language in languages] or list(PROMPTS.values())[:3]
    step("samples (prompt | continuation)", [python, str(tools / "generate.py"), "--load", run, "--prompt", *prompts])
    convert = [python, str(tools / "convert_to_hf.py"), "--load", run, "--save", f"{run}/hf", "--check"]
    step("export to Hugging Face", convert)
    print(f"\ndone in {time.time() - begin:.0f} s: {run}/metrics.jsonl, {run}/checkpoints, {run}/hf")


if __name__ == "__main__":
    main()
