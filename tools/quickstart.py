#!/usr/bin/env python3
"""The whole way once: corpus, tokenizer, tokens, 3D-parallel training, samples, export, check (`make pretrain`)."""

import argparse
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from megapoly.data.corpus import prepare_corpus
from megapoly.errors import exit_on_error

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = "The old clockmaker|Der Zug nach|El río|Вечером мы|图书馆|아침에 우리는|ในตอนเช้า|في الصباح".split("|")


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
    print(f"\n== {title}\n$ {' '.join(command)}", flush=True)
    status = subprocess.run(command, check=False).returncode  # noqa: S603
    if status:
        sys.exit(status)


@exit_on_error
def main() -> None:
    """Prepare the text, train on it, sample from the result, export it and load the export."""
    parser = argparse.ArgumentParser(description=__doc__)
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
    # The run's name follows the prepared data, so that changed text starts a run anew instead of spoiling an old one.
    manifest = hashlib.blake2b((data / "manifest.json").read_bytes(), digest_size=4).hexdigest()
    run = f"runs/{data.name}-{manifest}"
    ranks, layout = layout_flags()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = [str(ROOT / "examples/pretrain_polylm.sh"), "--config", config, "--run-dir", run, *layout, *flags]
    step("training", [*torchrun, *script])
    python, tools = sys.executable, ROOT / "tools"
    step("samples (prompt | continuation)", [python, str(tools / "generate.py"), "--load", run, "--prompt", *PROMPTS])
    convert = [python, str(tools / "convert_to_hf.py"), "--load", run, "--save", f"{run}/hf", "--check"]
    step("export to Hugging Face", convert)
    print(f"\ndone in {time.time() - begin:.0f} s: {run}/metrics.jsonl, {run}/checkpoints, {run}/hf")


if __name__ == "__main__":
    main()
