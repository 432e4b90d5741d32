"""What tokenizing a corpus costs: python kernels/bench/preprocess.py [--only tokenizers] [--mb 30] [--json FILE]

tools/preprocess_data.py beside the bare library that writes ids to a file, and beside megatron-core's writer fed by
that library; on the same text, the same tokenizer and the same number of cores, one after the other, A B C A B C .. in
processes of their own, timed from start to end. The figure is the median of the ratios of neighbours. Memory is the
peak of all processes of a contestant together (proportional set size, sampled).

tokenizers, sentencepiece   each against the bare library (at least 0.95 of it) and the writer; a quarter of the text
                            besides, by which the time that each takes to start is told from that of the text
gigatoken                   the same on ten times the text of --mb, at least 50 MB/s; beside it a start over a few lines
                            (below 2 s) and memory at a tenth of the text, which has to be the same

Text is generated, or comes from the *.jsonl.gz of a folder that MEGAPOLY_CORPUS names; it is repeated to the size.
"""

import argparse
import gzip
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NOT_RUNNABLE = 2
PACKAGES = ("tokenizers", "sentencepiece", "gigatoken", "megatron-core", "numpy", "pyarrow")
LIBRARIES = ["tokenizers", "sentencepiece", "gigatoken"]
LEAST = {"tokenizers": 0.95, "sentencepiece": 0.95, "gigatoken": 0.0}
LEAST_MB, MOST_START_SECONDS, MOST_BYTES, FLAT = 50.0, 2.0, 1 << 30, 1.15
DOCUMENTS = 1000


@dataclass(frozen=True)
class Contestant:
    """Who encodes: megapoly, bare (ids to a file) or megatron (its writer), with a library."""

    name: str
    library: str


# -------------------------------------------------------------------------------------------------- text and tokenizers


def texts(smoke: bool) -> Iterator[str]:
    """Documents of the folder that MEGAPOLY_CORPUS names, languages in turn, or of words that do not exist."""
    folder = os.environ.get("MEGAPOLY_CORPUS")
    if folder and not smoke:
        paths = sorted(Path(folder).glob("*.jsonl.gz"))
        files = [gzip.open(path, "rt", encoding="utf-8") for path in paths]  # noqa: SIM115
        while files:
            for file in list(files):
                line = file.readline()
                if line:
                    yield json.loads(line)["text"]
                else:
                    files.remove(file)
        return
    chance = random.Random(0)  # noqa: S311
    ranges = [(97, 122), (1072, 1103), (0xAC00, 0xADFF), (0x4E00, 0x4FFF), (0x0E01, 0x0E2E), (0x0627, 0x064A)]
    words = [
        ["".join(chr(chance.randint(*r)) for _ in range(chance.randint(1, 9))) for _ in range(20_000)] for r in ranges
    ]
    for i in range(300 if smoke else 12_000):
        chosen = words[i % len(words)]
        # Zipf: a few words are most of a text, and new ones never end.
        yield " ".join(chosen[min(19_999, int(chance.paretovariate(0.7)) - 1)] for _ in range(chance.randint(20, 700)))


def write_text(path: Path, documents: list[str], megabytes: float) -> None:
    """Documents over and over as JSONL, up to a size."""
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in documents]
    left, i = int(megabytes * 1e6), 0
    with path.open("wb") as file:
        while left > 0:
            file.write(lines[i % len(lines)])
            left, i = left - len(lines[i % len(lines)]), i + 1


def train(folder: Path, documents: list[str], vocab: int) -> dict[str, list[str]]:
    """(type, file) of a tokenizer for each library."""
    from megapoly.tokenizer.train import train_byte_level_bpe, train_sentencepiece

    train_sentencepiece(documents, str(folder / "t.model"), vocab)
    train_byte_level_bpe(documents, str(folder / "tokenizer.json"), vocab)
    bpe = ["HuggingFaceTokenizer", str(folder / "tokenizer.json")]
    return {"sentencepiece": ["SentencePieceTokenizer", str(folder / "t.model")], "tokenizers": bpe, "gigatoken": bpe}


# ----------------------------------------------------------------------------------------------- the measured processes


def encoder(library: str, file: str, workers: int) -> Any:
    """The library's own way to encode a list of texts on some cores, as a function to arrays of ids."""
    import numpy as np

    os.environ["RAYON_NUM_THREADS"] = str(workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if library == "sentencepiece":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=file)
        return lambda texts: [np.array(ids, np.int32) for ids in model.encode(texts, num_threads=workers)]
    if library == "gigatoken":
        import gigatoken

        fast = gigatoken.Tokenizer(file)
        return lambda texts: fast.encode_batch(texts, parallel=workers > 1)
    import tokenizers

    slow = tokenizers.Tokenizer.from_file(file)
    return lambda texts: [np.array(e.ids, np.int32) for e in slow.encode_batch_fast(texts, add_special_tokens=False)]


def batches(path: str) -> Iterator[list[str]]:
    """Texts of a JSONL file, a thousand at a time."""
    found: list[str] = []
    with open(path, "rb") as file:
        for line in file:
            found.append(json.loads(line)["text"])
            if len(found) == DOCUMENTS:
                yield found
                found = []
    if found:
        yield found


def peer(kind: str, library: str, tokenizer: str, path: str, out: str, workers: int) -> None:
    """Encode a file as `bare` or by megatron-core's writer."""
    import numpy as np

    encode = encoder(library, tokenizer, workers)
    if kind == "bare":
        with open(out, "wb") as file:
            for texts in batches(path):
                for ids in encode(texts):
                    file.write(np.asarray(ids).astype(np.uint16).data)
        return
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=np.uint16)
    import torch

    for texts in batches(path):
        for ids in encode(texts):
            builder.add_document(torch.from_numpy(np.array(ids, dtype=np.int64)), [len(ids)])
    builder.finalize(f"{out}.idx")


def command(who: Contestant, tokenizer: list[str], path: Path, folder: Path, workers: int) -> list[str]:
    """The process of a contestant."""
    out = str(folder / f"{who.name}-{who.library}")
    if who.name != "megapoly":
        return [sys.executable, __file__, "--peer", who.name, who.library, tokenizer[1], str(path), out, str(workers)]
    return [
        sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(path), "--output-prefix", out,
        "--tokenizer-type", tokenizer[0], "--tokenizer-model", tokenizer[1], "--tokenizer-backend", who.library,
        "--workers", str(workers), "--log-interval", "0",
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------- in the process that measures


class Failed(Exception):
    """A contestant that stopped; the message is its last line."""


@dataclass
class Cost:
    """Seconds from start to end, seconds of all cores together, peak bytes; of a process with all its children."""

    seconds: float
    core_seconds: float
    peak: int


def measure(arguments: list[str]) -> Cost:
    """Run a process to its end."""
    given = os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{given}" if given else str(ROOT)}
    begin, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(arguments, stdout=said, stderr=subprocess.STDOUT, env=environment)
        while True:
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            peak = max(peak, sum(map(memory, family(process.pid))))
            time.sleep(0.05 if peak else 0.005)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise Failed((said.read().decode(errors="replace").strip().splitlines() or ["no word"])[-1])
    return Cost(seconds, used.ru_utime + used.ru_stime, peak)


def family(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:  # a thread that has ended meanwhile
                continue
    return found


def memory(pid: int) -> int:
    """Proportional set size of a process; 0 where it has ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)


def race(library: str, options: argparse.Namespace, folder: Path, tokenizer: list[str]) -> dict[str, Any]:
    """megapoly beside the bare library and, if it is there, megatron-core's writer."""
    path = folder / f"{'large' if library == 'gigatoken' else 'text'}.jsonl"
    megabytes = path.stat().st_size / 1e6
    names = ["megapoly", "bare", *(["megatron"] if importlib.util.find_spec("megatron") else [])]
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    told: dict[str, Any] = {
        "part": "preprocess",
        "library": library,
        "mb": megabytes,
        "workers": options.workers,
        "note": "",
    }
    quarters: dict[str, list[Cost]] = {name: [] for name in (["megapoly", "bare"] if library != "gigatoken" else [])}
    try:
        for _ in range(options.rounds):
            for file, into in ((path, costs), (folder / "quarter.jsonl", quarters)):
                for name in into:
                    arguments = command(Contestant(name, library), tokenizer, file, folder, options.workers)
                    into[name].append(measure(arguments))
        if library == "gigatoken":
            few, tenth = (
                command(Contestant("megapoly", library), tokenizer, folder / f"{file}.jsonl", folder, options.workers)
                for file in ("few", "text")
            )
            told["start_seconds"] = min(measure(few).seconds for _ in range(3))
            told["tenth_gb"] = measure(tenth).peak / 1e9
    except Failed as failure:
        return told | {"note": str(failure)}
    for what in ("seconds", "core_seconds"):
        column = {name: [getattr(cost, what) for cost in costs[name]] for name in names}
        told[f"ratios_{what}"] = {
            name: statistics.median(a / b for a, b in zip(column[name], column["megapoly"], strict=True))
            for name in names[1:]
        }
        told[what] = {name: statistics.median(column[name]) for name in names}
    told["mb_per_second"] = {name: megabytes / took for name, took in told["seconds"].items()}
    told["gb"] = {name: max(cost.peak for cost in costs[name]) / 1e9 for name in names}
    if quarters:
        told["ratio_of_slopes"] = ratio_of_slopes(costs, quarters)
    return told | {"met": judge(told)}


def ratio_of_slopes(costs: dict[str, list[Cost]], quarters: dict[str, list[Cost]]) -> float:
    """The bare library's seconds for more text by megapoly's: what the ratio comes to where a start is nothing."""
    more = {
        name: [whole.seconds - part.seconds for whole, part in zip(costs[name], quarters[name], strict=True)]
        for name in quarters
    }
    return statistics.median(bare / own for bare, own in zip(more["bare"], more["megapoly"], strict=True))


def judge(told: dict[str, Any]) -> dict[str, bool]:
    """Which of its bounds a result keeps."""
    met = {"memory": told["gb"]["megapoly"] * 1e9 < MOST_BYTES}
    if told["library"] != "gigatoken":
        return met | {"speed": told["ratios_seconds"]["bare"] >= LEAST[told["library"]]}
    flat = told["gb"]["megapoly"] <= FLAT * told["tenth_gb"]
    fast = told["mb_per_second"]["megapoly"] >= LEAST_MB
    return met | {"speed": fast, "start": told["start_seconds"] < MOST_START_SECONDS, "flat": flat}


def row(told: dict[str, Any]) -> str:
    """A result as a line of text."""
    head = f"preprocess {told['library']:<14}"
    if told["note"]:
        return head + told["note"]
    speeds = ", ".join(f"{name} {speed:.2f}" for name, speed in told["mb_per_second"].items())
    ratios = ", ".join(
        f"{ratio:.3f} of {name} ({told['ratios_core_seconds'][name]:.3f} by core seconds)"
        for name, ratio in told["ratios_seconds"].items()
    )
    sizes = ", ".join(f"{name} {size:.2f}" for name, size in told["gb"].items())
    more = ""
    if "ratio_of_slopes" in told:
        more = f"; {told['ratio_of_slopes']:.3f} of bare between a quarter of the text and all of it, no start counted"
    if told["library"] == "gigatoken":
        more = f"; start {told['start_seconds']:.2f} s; {told['tenth_gb']:.2f} GB at a tenth of the text"
    verdicts = ", ".join(f"{what} {'met' if met else 'NOT MET'}" for what, met in told["met"].items())
    return f"{head}{told['mb']:.0f} MB: {ratios} [MB/s: {speeds}; GB: {sizes}{more}]: {verdicts}"


def environment(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """What a reader needs to know beside the figures, with the versions of these packages."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "smoke": options.smoke, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
        "versions": versions, "load": os.getloadavg(), "corpus": bool(os.environ.get("MEGAPOLY_CORPUS")),
    }  # fmt: skip


def main() -> int:
    """Measure, print and write; the exit status."""
    parser = argparse.ArgumentParser(description="Times preprocess_data.py beside bare libraries and megatron-core.")
    parser.add_argument("--only", nargs="+", default=LIBRARIES, choices=LIBRARIES)
    parser.add_argument("--mb", type=float, default=100, help="text; gigatoken gets ten times as much")
    parser.add_argument("--vocab", type=int, default=64_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results to this file, as they come")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; measures nothing")
    options = parser.parse_args()
    if options.smoke:
        options.mb, options.vocab, options.rounds = 0.4, 1600, 1
    sys.path.insert(0, str(ROOT))
    needed = {"tokenizers", "sentencepiece", "numpy", "gigatoken" if "gigatoken" in options.only else "numpy"}
    missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        print(f"{Path(__file__).name}: needs {', '.join(missing)}; pip install -e '.[test]'")
        return NOT_RUNNABLE
    head = environment(options, PACKAGES)
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-preprocess-") as name:
        folder = Path(name)
        documents = list(texts(options.smoke))
        tokenizers = train(folder, documents[:: max(1, len(documents) // 4000)], options.vocab)
        sizes = (("text", options.mb), ("quarter", options.mb / 4), ("large", 10 * options.mb), ("few", 0.01))
        for file, megabytes in sizes:
            if file in ("text", "quarter") or "gigatoken" in options.only:
                write_text(folder / f"{file}.jsonl", documents, megabytes)
        for library in options.only:
            results.append(race(library, options, folder, tokenizers[library]))
            print(row(results[-1]), flush=True)
            if options.json is not None:  # each time: what was measured survives if this is killed
                options.json.write_text(json.dumps(head | {"results": results}, indent=1) + "\n")
    if importlib.util.find_spec("megatron") is None:
        print(f"{Path(__file__).name}: needs megatron-core to be measured beside it; pip install megatron-core")
        return NOT_RUNNABLE
    return 1 if any(told["note"] for told in results) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        kind, library, tokenizer, path, out, workers = sys.argv[2:]
        sys.exit(peer(kind, library, tokenizer, path, out, int(workers)))
    sys.exit(main())
