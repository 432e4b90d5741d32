"""What deduplication costs: python kernels/bench/dedup.py [--mb 100] [--workers 2] [--json FILE]

The four stages of megapoly/data/clean/dedup.py over the same text, each a run of datatrove's local executor in a
process of its own, timed from start to end: megabytes of text a second, the same by seconds of all cores together (what
other work on the machine disturbs less), and the peak of memory of all processes together. All four together are to
reach 8 MB/s on 2 cores.

Beside the first stage, on a part of the text and one core, by core seconds and each with the start of its process:
datatrove's own signatures with its tokenizer of English (where that can run) and with str.split; shingles in Python
with rensa's signatures and with datasketch's (where it is there), which hash and write nothing else.

The text comes from the *.jsonl.gz of a folder that MEGAPOLY_CORPUS names, else it is generated; it is repeated to the
size with a third of the words exchanged, which leaves no near duplicates. Of the documents a tenth are exact copies
and a tenth copies with one word exchanged: how many of them were found is printed as well.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preprocess import Cost, Failed, environment, measure, texts

ROOT = Path(__file__).parents[2]
NOT_RUNNABLE = 2
STAGES = ["signatures", "buckets", "clusters", "drop"]
PEERS = ["megapoly", "datatrove", "datatrove with str.split", "Python and rensa", "datasketch"]
PACKAGES = ("datatrove", "rensa", "numpy", "orjson", "datasketch", "spacy", "xxhash")
FILES = 8
LEAST_MB = 8.0


# ------------------------------------------------------------------------------------------------------------- the text


def varied(text: str, chance: random.Random, share: float) -> str:
    """A text with a share of its words, or characters where it has no spaces, exchanged for others of itself."""
    separator = " " if text.count(" ") * 20 > len(text) else ""
    units = text.split(" ") if separator else list(text)
    for place in chance.sample(range(len(units)), max(1, int(share * len(units)))):
        units[place] = chance.choice(units)
    return separator.join(units)


def documents(megabytes: float, smoke: bool) -> Iterator[tuple[str, str]]:
    """Texts up to a size, each with what it is: new, exact or near."""
    chance = random.Random(0)  # noqa: S311
    originals = list(texts(smoke))
    left, number = megabytes * 1e6, 0
    while left > 0:
        text, again = originals[number % len(originals)], number >= len(originals)
        kinds = [("new", varied(text, chance, 1 / 3) if again else text)]
        if number % 8 == 0:
            kinds += [("exact", kinds[0][1]), ("near", varied(kinds[0][1], chance, 0))]
        for kind, content in kinds:
            yield kind, content
            left -= len(content.encode())
        number += 1


def write(folder: Path, megabytes: float, smoke: bool, files: int = FILES) -> dict[str, float]:
    """JSONL files, and what is in them: megabytes of text and documents of each kind."""
    folder.mkdir()
    told: dict[str, float] = {"mb": 0.0, "new": 0, "exact": 0, "near": 0}
    outputs = [(folder / f"{i:02d}.jsonl").open("w", encoding="utf-8") for i in range(files)]
    for i, (kind, text) in enumerate(documents(megabytes, smoke)):
        outputs[i % files].write(json.dumps({"text": text, "id": f"{kind} {i}"}, ensure_ascii=False) + "\n")
        told["mb"] += len(text.encode()) / 1e6
        told[kind] += 1
    for output in outputs:
        output.close()
    return told


# ----------------------------------------------------------------------------------------------- the measured processes


def run_stage(name: str, source: str, work: str, workers: str) -> None:
    """One stage on the local executor; forked workers, so that their core seconds are counted here."""
    from datatrove.executor.local import LocalPipelineExecutor

    from megapoly.data.clean.dedup import DedupSettings, DropDuplicates, dedup_stages, documents_reader
    from megapoly.data.clean.stage import Stage

    drop = Stage("drop", FILES, [documents_reader(source), DropDuplicates(f"{work}/dedup", FILES)])
    stages = {stage.name: stage for stage in [*dedup_stages(source, f"{work}/dedup", FILES, DedupSettings()), drop]}
    chosen = stages[name]
    LocalPipelineExecutor(
        chosen.steps, tasks=chosen.tasks, workers=min(int(workers), chosen.tasks),
        logging_dir=f"{work}/logs/{name}", start_method="fork",
    ).run()  # fmt: skip


def shingle_sets(source: str, ngram: int = 5) -> Iterator[set[str]]:
    """The n-grams of each document, of words or characters by the script."""
    import regex

    unspaced = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}"
    word = regex.compile(rf"(?V1)[{unspaced}]|[\w--[{unspaced}]]+")
    for path in sorted(Path(source).glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                found = word.findall(json.loads(line)["text"].casefold())
                yield {" ".join(found[i : i + ngram]) for i in range(max(1, len(found) - ngram + 1))}


def run_peer(name: str, source: str, work: str) -> None:
    """Signatures of all documents by a peer, on one core."""
    if name == "datasketch":
        from datasketch import MinHash

        for shingles in shingle_sets(source):
            MinHash(112, seed=1).update_batch([shingle.encode() for shingle in shingles])
    elif name == "Python and rensa":
        os.environ["RAYON_NUM_THREADS"] = "1"
        from rensa import RMinHash

        for shingles in shingle_sets(source):
            RMinHash.digests_from_token_sets([list(shingles)], 112, 1)
    else:
        from datatrove.pipeline.dedup import MinhashDedupSignature
        from datatrove.pipeline.dedup.minhash import MinhashConfig
        from datatrove.utils.hashing import HashConfig
        from datatrove.utils.word_tokenizers import WordTokenizer

        from megapoly.data.clean.dedup import documents_reader

        class Split(WordTokenizer):
            """Words between spaces, in place of a tokenizer that is not there."""

            def word_tokenize(self, text: str) -> list[str]:
                return text.split()

            def sent_tokenize(self, text: str) -> list[str]:
                return text.splitlines()

            def span_tokenize(self, text: str) -> list[tuple[int, int]]:
                return [match.span() for match in re.finditer(r"\S+", text)]

        hashes = HashConfig(hash_fc="xxhash" if importlib.util.find_spec("xxhash") else "sha1")
        language: Any = Split() if name.endswith("str.split") else "eng_Latn"
        step = MinhashDedupSignature(f"{work}/signatures", MinhashConfig(hash_config=hashes), language)
        step.run(documents_reader(source).run(None, 0, 1), 0, 1)


def run_own(source: str, work: str) -> None:
    """The first stage alone, on one core and without an executor."""
    from megapoly.data.clean.dedup import DedupSettings, dedup_stages

    reader, signatures = dedup_stages(source, work, 1, DedupSettings())[0].steps
    signatures.run(reader.run(None, 0, 1), 0, 1)


# ----------------------------------------------------------------------------------------- in the process that measures


def measured(told: dict[str, float], rounds: list[list[Cost]], workers: int) -> list[dict[str, Any]]:
    """A result for each stage and one for all together; the median of the rounds."""
    results = []
    for name, costs in zip([*STAGES, "all"], [*zip(*rounds, strict=True), None], strict=True):
        seconds, core = (
            [getattr(cost, what) for cost in costs] if costs else [sum(getattr(c, what) for c in one) for one in rounds]
            for what in ("seconds", "core_seconds")
        )
        peak = max(cost.peak for cost in costs or [cost for one in rounds for cost in one])
        results.append({
            "part": "dedup", "stage": name, "mb": told["mb"], "workers": workers,
            "mb_per_second": told["mb"] / statistics.median(seconds),
            "mb_per_core_second": told["mb"] / statistics.median(core), "gb": peak / 1e9,
        })  # fmt: skip
    results[-1]["met"] = results[-1]["mb_per_second"] >= LEAST_MB
    return results


def found(work: Path) -> dict[str, int]:
    """How many documents the last stage dropped, by reason."""
    kept = json.loads((work / "logs" / "drop" / "stats.json").read_text())
    stats = next(step["stats"] for step in kept if "drop duplicates" in step["name"])
    return {reason: stats.get(f"dropped {reason} duplicate", 0) for reason in ("exact", "near")}


def row(result: dict[str, Any]) -> str:
    """A result as a line of text."""
    if result["part"] == "signatures on one core":
        head = f"{result['part']}, {result['peer']:<25}"
        return head + (result["note"] or f"{result['mb_per_core_second']:8.2f} MB/core second, {result['gb']:.2f} GB")
    speed, core = result["mb_per_second"], result["mb_per_core_second"]
    line = (
        f"dedup {result['stage']:<11} {result['workers']} workers {speed:8.1f} MB/s; {core:7.1f} MB/core second, "
        f"x {result['workers']} = {result['workers'] * core:.1f} MB/s on idle cores; {result['gb']:.2f} GB"
    )
    if "met" in result:
        line += f"; at least {LEAST_MB:g} MB/s {'met' if result['met'] else 'NOT MET'}"
    return line


def race(peer: str, source: Path, work: Path, megabytes: float) -> dict[str, Any]:
    """A peer's signatures, or why there are none."""
    told: dict[str, Any] = {"part": "signatures on one core", "peer": peer, "mb": megabytes, "note": ""}
    try:
        cost = measure([sys.executable, __file__, "--peer", peer, str(source), str(work / peer.replace(" ", "-"))])
    except Failed as failure:
        return told | {"note": f"not runnable: {failure}"}
    return told | {"mb_per_core_second": megabytes / cost.core_seconds, "gb": cost.peak / 1e9}


def main() -> int:
    """Measure, print and write; the exit status."""
    parser = argparse.ArgumentParser(description="Times deduplication by stages, and peers beside its first.")
    parser.add_argument("--mb", type=float, default=100)
    parser.add_argument("--peer-mb", type=float, default=25, help="text for the peers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; measures nothing")
    options = parser.parse_args()
    if options.smoke:
        options.mb, options.peer_mb, options.rounds = 0.3, 0.1, 1
    missing = sorted(name for name in ("datatrove", "rensa", "orjson") if importlib.util.find_spec(name) is None)
    if missing:
        print(f"{Path(__file__).name}: needs {', '.join(missing)}; pip install -e '.[clean]'")
        return NOT_RUNNABLE
    with tempfile.TemporaryDirectory(prefix="bench-dedup-") as name:
        folder = Path(name)
        told = write(folder / "documents", options.mb, options.smoke)
        rounds: list[list[Cost]] = []
        for i in range(options.rounds):
            arguments = [str(folder / "documents"), str(folder / f"round-{i}"), str(options.workers)]
            rounds.append([measure([sys.executable, __file__, "--stage", stage, *arguments]) for stage in STAGES])
        results = measured(told, rounds, options.workers)
        print("\n".join(map(row, results)), flush=True)
        dropped = found(folder / "round-0")
        print(f"found: {json.dumps(dropped)} duplicates; written in: {json.dumps(told)}", flush=True)
        part = write(folder / "part", options.peer_mb, options.smoke, 1)
        for peer in PEERS:
            results.append(race(peer, folder / "part", folder, part["mb"]))
            print(row(results[-1]), flush=True)
    if options.json is not None:
        document = environment(options, PACKAGES) | {"text": told, "found": dropped, "results": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stage"]:
        sys.exit(run_stage(*sys.argv[2:]))
    if sys.argv[1:2] == ["--peer"]:
        sys.exit(run_own(*sys.argv[3:]) if sys.argv[2] == "megapoly" else run_peer(*sys.argv[2:]))
    sys.exit(main())
