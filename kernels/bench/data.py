"""What the data order costs: python kernels/bench/data.py [--only opening order reading megatron] [--json FILE]

opening   a set of 640 billion tokens in 18 languages, 2,400 files and 1.07 x 10^9 documents (headers and ends of the
          files; what lies between is a hole), opened in a fresh process: files, plan and the first samples; a plan of
          300 stages over 100 sources
order     source, epoch and slice of a sample, in batches, by the extension and by its twin in numpy
reading   the 2,049 tokens of a sample from files in the page cache, checked against the vocabulary
megatron  the same beside megatron-core's GPTDataset and BlendedDataset: 18 files, so many documents of 2,048 tokens on
          average, and so many samples of 2,048 tokens; time and memory to open them (theirs also a second time, from
          the files that the first left), files written, and a sample's time. Speeds are measured in turn, A B A B ..,
          in processes of their own that wait meanwhile; the figure is the median of the ratios of neighbours
"""

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from data_sides import (
    LANGUAGES,
    LENGTH,
    VOCAB,
    WINDOW,
    Case,
    Failed,
    Megapoly,
    MegatronCore,
    opened,
    write_case,
)
from results import environment, write_json

NOT_RUNNABLE = 2
PARTS = ["opening", "order", "reading", "megatron"]
FULL = Case("640 billion tokens", files=2400, documents=2400 * 444_444, samples=312_500_000, length=600)


def run_opening(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Time and memory of opening, and a plan of very many stages."""
    case = replace(FULL, files=36, documents=360_000, samples=9_000) if options.smoke else FULL
    write_case(case, folder)
    found = []
    for _ in range(options.rounds):
        one, told = opened(Megapoly, case, folder)
        one.close()
        found.append(told)
    told = {key: statistics.median(each[key] for each in found) for key in found[0]}
    what = f"{case.name}, {LANGUAGES} languages, {case.files:,} files"
    yield {"part": "opening", "what": what, "most": {"seconds": 1.0, "peak_mb": 200.0}, **told}
    stages, sources = (6, 5) if options.smoke else (300, 100)
    pairs = [open_stages(stages, sources) for _ in range(options.rounds)]
    seconds, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
    what = f"a plan of {stages} stages over {sources} sources"
    yield {"part": "opening", "what": what, "most": {"seconds": 1.0}, "seconds": seconds, "cpu_seconds": cpu}


def sampler_of(stages: int, sources: int, samples: int, native: bool | None = None) -> Any:
    """A sampler of random shares."""
    from fractions import Fraction

    from megapoly.data.sampler import Sampler, StageTarget

    rng = np.random.default_rng(1)
    targets = []
    for _ in range(stages):
        weights = [Fraction(int(weight)) for weight in rng.integers(1, 10**6, sources)]
        targets.append(StageTarget(samples, tuple(weight / sum(weights) for weight in weights)))
    return Sampler(rng.integers(10**5, 10**6, sources).tolist(), targets, 1, native)


def open_stages(stages: int, sources: int) -> tuple[float, float]:
    """Seconds from the targets to the first samples, and of them on a processor."""
    from megapoly.data.sampler import Sampler

    targets = sampler_of(stages, sources, 10_000).targets
    begin, cpu = time.perf_counter(), time.process_time()
    Sampler([10**6] * sources, targets, 1).samples(0, 1)
    return time.perf_counter() - begin, time.process_time() - cpu


def run_order(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Microseconds a sample, by both implementations in turn."""
    batches = 2 if options.smoke else 25
    both = {"C++": sampler_of(2, LANGUAGES, 10**12, True), "numpy": sampler_of(2, LANGUAGES, 10**12, False)}
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for n in range(options.rounds + 1):
        for name, one in both.items():
            begin = time.perf_counter()
            for batch in range(batches):
                first = 10**12 - 10**9 + (n * batches + batch) * WINDOW
                one.samples(first, first + WINDOW)
            seconds[name].append((time.perf_counter() - begin) / batches / WINDOW)
    what = f"a sample in batches of {WINDOW:,} near sample 10^12, {LANGUAGES} sources"
    for name, found in seconds.items():
        told = {"microseconds": 1e6 * statistics.median(found[1:])}
        yield {"part": "order", "what": f"{what}, {name}", **told} | (
            {"most": {"microseconds": 1.0}} if name == "C++" else {}
        )


def run_reading(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Microseconds to read a sample's tokens where the page cache has them, from files of either type."""
    from megapoly.data.indexed import IndexedDatasetWriter, TokenStream

    for vocab in (VOCAB, 256_000):
        prefixes = [str(folder / f"{vocab}_{i}") for i in range(4)]
        for number, prefix in enumerate(prefixes):
            with IndexedDatasetWriter(prefix, vocab) as writer:
                for _ in range(2 if options.smoke else 100):
                    writer.add_document(np.random.default_rng(number).integers(0, vocab, 100_000))
                writer.finalize()
        stream = TokenStream(prefixes, vocab)
        slices = (stream.num_tokens - 1) // LENGTH
        order = np.random.default_rng(5).permutation(slices).tolist()
        seconds = []
        for _ in range(options.rounds + 1):
            begin = time.perf_counter()
            for k in order:
                stream.read(k * LENGTH, (k + 1) * LENGTH + 1)
            seconds.append((time.perf_counter() - begin) / slices)
        what = f"the {LENGTH + 1:,} tokens of a sample, {stream.datasets[0].dtype}"
        told = {"microseconds": 1e6 * statistics.median(seconds[1:]), "most": {"microseconds": 5.0}}
        yield {"part": "reading", "what": what, **told}


def run_megatron(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Both sides at every number of documents and samples."""
    for documents in [360] if options.smoke else options.documents:
        for samples in [400] if options.smoke else options.samples:
            name = f"{documents:,} documents, {samples:,} samples"
            case = Case(name, LANGUAGES, documents, samples, lengths_vary=True)
            with tempfile.TemporaryDirectory(prefix="case-", dir=folder) as place:
                write_case(case, Path(place))
                for told in race(case, Path(place), options):
                    yield {"part": "megatron", "case": case.name, **told}


def race(case: Case, folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Opening of both, theirs twice; then order, tokens and whole samples in turn."""
    before = {path for path in folder.rglob("*") if path.is_file()}
    ours, told = opened(Megapoly, case, folder)
    yield {"side": "megapoly", "what": "open", **told, **written(folder, before)}
    peer, told = opened(MegatronCore, case, folder)
    yield {"side": "megatron-core", "what": "open, first time", **told, **written(folder, before)}
    again, told = opened(MegatronCore, case, folder)
    again.close()
    yield {"side": "megatron-core", "what": "open, again", **told}
    for what, name, count in (
        ("order of a sample", "look_up", 100 * WINDOW), ("tokens of a sample", "read", 2000),
        ("whole training sample", "batch", 2000),
    ):  # fmt: skip
        count = min(count, case.samples // 4 // 8 * 8)
        pairs = []
        for _ in range(options.rounds + 1):
            pairs.append([one.ask(name, case.samples // 2 // 8 * 8, count)[0] / count for one in (ours, peer)])
        mine, theirs = (1e6 * statistics.median(column) for column in zip(*pairs[1:], strict=True))
        ratio = statistics.median(theirs / mine for mine, theirs in pairs[1:])
        yield {"side": "both", "what": what, "microseconds": mine, "peer_microseconds": theirs, "ratio": ratio}
    ours.close()
    peer.close()


def written(folder: Path, before: set[Path]) -> dict[str, float]:
    """Files that opening left, and their size."""
    new = [path for path in folder.rglob("*") if path.is_file() and path not in before]
    return {"files": len(new), "files_mb": sum(path.stat().st_size for path in new) / 1e6}


def line(told: dict[str, Any]) -> str:
    """A result as a line of text."""
    parts = []
    if "seconds" in told:
        parts.append(f"{told['seconds']:.3f} s ({told['cpu_seconds']:.3f} s on a processor)")
    if "mb" in told:
        parts.append(f"{told['mb']:,.0f} MB more resident, {told['peak_mb']:,.0f} MB at most")
    if "files" in told:
        parts.append(f"{told['files']} files of {told['files_mb']:,.0f} MB written")
    if "ratio" in told:
        parts.append(f"{told['microseconds']:.3f} us; megatron-core {told['peer_microseconds']:.3f} us")
        parts.append(f"{told['ratio']:.2f} times as fast")
    elif "microseconds" in told:
        parts.append(f"{told['microseconds']:.3f} us")
    for quantity, most in told.get("most", {}).items():
        verdict = "met" if told[quantity] < most else "NOT MET"
        parts.append(f"below {most:g} {quantity}: {verdict}")
    side = f"{told['case']}: {told['side']}: " if told["part"] == "megatron" else ""
    return f"{told['part']:<10}{side}{told['what']}: {', '.join(parts)}"


RUN: dict[str, Callable[[argparse.Namespace, Path], Iterator[dict[str, Any]]]] = {
    "opening": run_opening, "order": run_order, "reading": run_reading, "megatron": run_megatron,
}  # fmt: skip


def missing(parts: list[str]) -> str:
    """What the chosen parts need and this interpreter lacks, with what brings it."""
    found = [name for name in ("numpy", "yaml", "megapoly") if importlib.util.find_spec(name) is None]
    if found:
        return f"{', '.join(found)}; pip install -e ., and run by make bench-data"
    from megapoly.data.native import NATIVE

    if NATIVE.module is None:
        return f"the extension: {NATIVE.reason}"
    has_megatron = importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core")
    if "megatron" in parts and not has_megatron:
        return "megatron-core; pip install megatron-core, or leave it out by --only opening order reading"
    return ""


def main() -> int:
    """Measure, print and write; the exit status."""
    parser = argparse.ArgumentParser(description="Times the data order and its reading, also beside megatron-core.")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--documents", nargs="+", type=int, default=[10**6, 10**7])
    parser.add_argument("--samples", nargs="+", type=int, default=[10**7, 10**8])
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each figure")
    parser.add_argument("--folder", type=Path, help="where the files are made; the temporary directory if left out")
    parser.add_argument("--json", type=Path, help="write the results to this file, as they come")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; measures nothing")
    options = parser.parse_args()
    if lack := missing(options.only):
        print(f"{Path(__file__).name}: needs {lack}")
        return NOT_RUNNABLE
    head = environment(True) | {"smoke": options.smoke, "cores": len(os.sched_getaffinity(0)), "numpy": np.__version__}
    if "megatron" in options.only:
        head["megatron-core"] = importlib.import_module("megatron.core").__version__
    versions = ", ".join(f"{name} {head[name]}" for name in ("python", "numpy", "megatron-core") if name in head)
    print(f"{head['cores']} cores, {versions}")
    results, has_failed = [], False
    for part in options.only:
        with tempfile.TemporaryDirectory(prefix="bench-data-", dir=options.folder) as name:
            try:
                for told in RUN[part](options, Path(name)):
                    print(line(told), flush=True)
                    results.append(told)
                    if options.json is not None:  # each time: what was measured survives if this is killed
                        write_json(options.json, head | {"results": results})
            except Failed as failure:
                print(f"{part:<10}{str(failure).strip().splitlines()[-1]}\n{failure}", file=sys.stderr)
                has_failed = True
    return 1 if has_failed else 0


if __name__ == "__main__":
    sys.exit(main())
