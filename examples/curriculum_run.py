#!/usr/bin/env python3
"""A curriculum on real text: straight, killed and resumed, on other ranks, made longer; nothing repeated or left out.

python examples/curriculum_run.py --corpus FOLDER [--out FOLDER]: files en.jsonl.gz, zh.jsonl.gz .. with {"text"} a line
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megapoly.arguments import ArgumentParser
from megapoly.config import load_config
from megapoly.data.curriculum import make_plan, open_sources
from megapoly.errors import ConfigError, DataError, exit_on_error
from megapoly.sections import CurriculumConfig, Stage
from megapoly.yaml12 import parse_yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples/curriculum_18_languages.yaml"
RAISED = ("es", "fr", "pt", "ru", "de", "it", "ar", "ja", "ko", "th", "vi", "id", "nl", "pl", "tr", "he")
APPENDED = {  # still 60%, the languages but English and Chinese alike, at a rate of its own
    "name": "raised", "tokens": 100e3, "language_weights": {"en": 40, "zh": 12} | dict.fromkeys(RAISED, 3),
    "lr": 3e-4, "min_lr": 1e-4,
}  # fmt: skip
RANKS, KILLED_AFTER, SAVED_AT = 8, 130, 120  # the kill falls into the ramp, 10 steps after a checkpoint
OTHER_RANKS, OTHER_LAYOUT = 4, ("--tensor-model-parallel-size", 1, "--pipeline-model-parallel-size", 1)
TIMED = ("seconds", "tokens_per_second", "tflops", "mfu", "probe", "loading")  # how these names begin


def tool(name: str, *words: Any, shown: int | None = None) -> str:
    """Run a tool of the project, ending with its status where it fails; prints the last `shown` lines, returns all."""
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if done.returncode:
        sys.exit(done.returncode)
    lines = done.stdout.rstrip().split("\n")
    said = lines if shown is None else lines[len(lines) - shown :]
    print("\n".join([f"$ python tools/{name} {shlex.join(map(str, words))}", *said]), flush=True)
    return done.stdout


def train(title: str, config: Path, ranks: int, *flags: Any, kill_after: int | None = None) -> None:
    """Train on so many ranks, to the end, or until metrics.jsonl has a step after which all is killed."""
    words = [str(ROOT / "examples/pretrain_polylm.sh"), "--config", str(config), *map(str, flags)]
    print(f"\n== {title}\n$ torchrun --nproc-per-node {ranks} {shlex.join(words)}", flush=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen([*launcher, *words], start_new_session=True)  # noqa: S603
    if kill_after is not None:
        rows = Path(flags[flags.index("--run-dir") + 1]) / "metrics.jsonl"
        while process.poll() is None and not (rows.exists() and len(rows.read_bytes().splitlines()) >= kill_after):
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"killed all {ranks} ranks after step {kill_after} or a little later", flush=True)
    elif status := process.wait():
        sys.exit(status)


def prepare(corpus: Path, data: Path) -> None:
    """A tokenizer of all languages, and the tokens of each."""
    files = {path.name.removesuffix(".jsonl.gz"): path for path in sorted(corpus.glob("*.jsonl.gz"))}
    languages = [source.language for source in load_config(str(CONFIG)).data.sources]
    if missing := [f"{language}.jsonl.gz" for language in languages if language not in files]:
        raise DataError(f"--corpus {corpus}: has no {', '.join(missing)}; each language of {CONFIG.name} is one file")
    model, inputs = data / "tokenizer.model", [files[language] for language in languages]
    size = ("--vocab-size", 8192, "--alpha", 0.3, "--max-bytes", 8_000_000)  # 0.3 is XLM-R's
    tool("train_tokenizer.py", "--input", *inputs, "--output", model, *size)
    for language in languages:
        known = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model, "--append-eod")
        place = ("--input", files[language], "--output-prefix", data / language)
        tool("preprocess_data.py", *place, *known, "--shuffle-seed", 1, shown=1)


def write_appended(path: Path, data: Path) -> None:
    """The same configuration with one stage more."""
    tree = parse_yaml(CONFIG.read_text(encoding="utf-8"), CONFIG.name)
    tree["curriculum"]["stages"].append(APPENDED)
    tree["data"]["data_root"] = str(data)
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The run's steps without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith(TIMED)} for line in lines]


def compare(title: str, run: Path, straight: list[dict[str, Any]]) -> None:
    """Say how the steps of a run differ from those of the straight one: the data, and the losses relative to theirs."""
    rows = read_rows(run)
    ours = [row for row in straight if row["step"] in {row["step"] for row in rows}]
    same = sum(a == b for a, b in zip(rows, ours, strict=True))
    data = sum(a["tokens_by_source"] == b["tokens_by_source"] for a, b in zip(rows, ours, strict=True))
    apart = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(rows, ours, strict=True))
    print(
        f"{title}: steps {rows[0]['step']} to {rows[-1]['step']}; tokens by source equal in {data}, "
        f"every number to the last bit in {same}; losses at most {apart:.1e} apart"
    )


def check_order(config: Path, longer: Path, flags: tuple[Any, ...]) -> None:
    """Count what two plans, one after the other, serve twice, and what of each source's own order they leave out."""
    cfg = load_config(str(longer))
    streams = [stream.num_tokens for stream in open_sources(cfg)]
    parts = [tool("curriculum.py", config, *flags, "--samples", ":", shown=0)]
    border = len(parts[0].splitlines())
    parts.append(tool("curriculum.py", longer, *flags, "--samples", f"{border}:", shown=0))
    lines = [json.loads(line) for part in parts for line in part.splitlines()]
    repeated = left_out = 0
    for source in cfg.data.sources:
        found = [(line["epoch"], line["offset"]) for line in lines if line["source"] == source.name]
        alone = Stage(name="alone", tokens=len(found) * cfg.model.seq_length, weights={source.name: 1.0})
        plan = make_plan(replace(cfg, curriculum=CurriculumConfig(stages=[alone])), streams)
        _, epochs, offsets = plan.sampler().samples(0, len(found))
        repeated += len(found) - len(set(found))
        left_out += len(set(zip(epochs.tolist(), offsets.tolist(), strict=True)) - set(found))
    print(
        f"order: {border:,} samples of the first plan, then {len(lines) - border:,} of the longer one, {len(streams)} "
        f"sources: {repeated} repeated, {left_out} left out"
    )


@exit_on_error
def main() -> None:
    """Prepare the text, train it in the four ways, compare."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True, type=Path, help="folder with <language>.jsonl.gz")
    parser.add_argument("--out", type=Path, default=Path("runs/18-languages"), help="where data and runs go")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    begin, out, data = time.time(), options.out, options.out / "data"
    if any((out / name).exists() for name in ("straight", "killed", "moved")):
        raise ConfigError(f"--out {out}: has the runs of an earlier call; remove it or give another folder")
    print("== tokenizer and tokens", flush=True)
    prepare(options.corpus, data)
    longer, root = out / "longer.yaml", ("--data-root", data)
    write_appended(longer, data)
    print("\n== the plan", flush=True)
    tool("curriculum.py", CONFIG, *root, "--png", out / "plan.png")
    runs = {name: ("--run-dir", out / name) for name in ("straight", "killed", "moved")}
    flags = ("--log-interval", 10, *root)
    train("straight", CONFIG, RANKS, *flags, *runs["straight"])
    train("killed", CONFIG, RANKS, *flags, *runs["killed"], kill_after=KILLED_AFTER)
    train("the same command again", CONFIG, RANKS, *flags, *runs["killed"])
    saved = out / "killed" / "checkpoints" / f"step_{SAVED_AT:08d}"
    train("on other ranks", CONFIG, OTHER_RANKS, *flags, *runs["moved"], "--load", saved, *OTHER_LAYOUT)
    straight = read_rows(out / "straight")
    print("\n== what is the same")
    compare(f"killed, resumed at {SAVED_AT}", out / "killed", straight)
    compare(f"on {OTHER_RANKS} ranks from step {SAVED_AT}", out / "moved", straight)
    train("a stage appended to the finished run", longer, RANKS, *flags, *runs["killed"])
    print("\n== what was read")
    check_order(CONFIG, longer, root)
    tool("curriculum.py", "--run", out / "killed", "--png", out / "run.png")
    print(f"\ndone in {time.time() - begin:.0f} s: {out / 'run.png'}, {out / 'plan.png'}")


if __name__ == "__main__":
    main()
