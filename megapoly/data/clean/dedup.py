"""Removing exact and near duplicates of a corpus, on one machine or a cluster: four stages that datatrove runs.

signatures  every task hashes its documents: the text (exact) and bands of MinHash values (near), sorted
buckets     every task merges some ranges of those hashes over all tasks, and pairs the documents that share one
clusters    one task joins the pairs to clusters, keeps one document of each and lists the others for each task
(the last)  every task reads its documents once more and drops what is listed

Two documents whose n-grams have the Jaccard similarity J share a band, and so a cluster, with the probability
1 - (1 - J^rows)^bands (Broder, "On the resemblance and containment of documents", 1997; Leskovec, Rajaraman, Ullman,
"Mining of Massive Datasets", ch. 3). The longest text of a cluster stays, of equally long ones the one with the
smaller hash: which texts remain depends on neither the number of tasks nor their order. Which of two copies that differ
in nothing but whitespace or form does: the first one of the first task that has one.
"""

import hashlib
import math
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers.jsonl import JsonlReader

from megapoly.data.clean.clusters import Nodes, all_but_one, node, place_of, spanning_forest
from megapoly.data.clean.dedup_files import HASHED, RecordFile, Records, RecordWriter, merged
from megapoly.data.clean.minhash import ALGORITHM, band_hashes, batches
from megapoly.data.clean.stage import Stage
from megapoly.data.text_input import Limits, read_lines
from megapoly.errors import ConfigError, DataError

DOCUMENT = np.dtype([("hash", "<u8"), ("length", "<u4")])  # of the text without superfluous whitespace
MERGED_RECORDS = 1 << 21  # held at once by a task of the stage `buckets`: 300 MB with what is computed from them
TASKS_IN_RANGE = 256  # tasks of `signatures` for each range that a band's hashes are cut into
MOST_RANGES = 64  # more would make the tables of sections longer than what they tell of
MOST = {"ngram": 100, "bands": 256, "rows": 64}  # bands times rows values are computed of each document
UNLIMITED = Limits(sys.maxsize, math.inf)  # what is read was written by an earlier stage
REASONS = ("", "exact duplicate", "near duplicate")


@dataclass(frozen=True)
class DedupSettings:
    """What counts as a duplicate: exact ones, and near ones by MinHash over n-grams in `bands` of `rows` values."""

    exact: bool = True
    near: bool = True
    ngram: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 1

    def __post_init__(self) -> None:
        if not (self.exact or self.near):
            raise ConfigError(
                "deduplication is asked for neither exact nor near duplicates: choose one or leave it out"
            )
        for name, most in MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} of deduplication is {getattr(self, name)}; give one from 1 to {most}")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed of deduplication is {self.seed}; give one from 0 to 2^64 - 1")


class DocumentsReader(JsonlReader):
    """datatrove's reader of JSONL; but damage ends the run, where its own goes on without what it cannot read."""

    def read_file(self, filepath: str) -> Iterator[Document]:
        """The documents of a file; raises DataError for a damaged or truncated one and for a line without text."""
        path = self.data_folder.resolve_paths(filepath)
        for number, line in read_lines(path, UNLIMITED):
            with self.track_time():
                try:
                    fields = orjson.loads(line)
                    if not isinstance(fields, dict) or not isinstance(fields.get(self.text_key), str):
                        raise ValueError(f"no object with a {self.text_key}")
                except ValueError as error:  # of orjson too
                    raise DataError(f"{path}, line {number}: {error}; write this file again") from None
                document = self.get_document_from_dict(fields, filepath, number)
            if document is not None:
                yield document


def documents_reader(documents: str) -> DocumentsReader:
    """Reads the JSONL files in a folder and below it, plain, .gz or .zst; every stage has to read by this one."""
    return DocumentsReader(documents, glob_pattern="**/*.jsonl*")


def dedup_stages(documents: str, work: str, tasks: int, settings: DedupSettings) -> list[Stage]:
    """The stages before `DropDuplicates`: they read the folder `documents` and leave lists in the folder `work`.

    `work` has to be one that all machines see, empty at first. A task holds some 300 bytes for each of its documents
    in the first stage, a fixed amount in the second; the single task of the third needs about 200 bytes for each
    document that is in a pair.
    """
    plan = Plan(Path(work), tasks, settings)
    return [
        Stage("signatures", tasks, [documents_reader(documents), WriteSignatures(plan)]),
        Stage("buckets", min(tasks, plan.ranges * len(plan.hashes)), [PairDocuments(plan)]),
        Stage("clusters", 1, [ListDuplicates(plan)]),
    ]


@dataclass(frozen=True)
class Plan:
    """How the work is divided, and where its files lie; a section of a file is one range of one kind of hash."""

    work: Path
    tasks: int
    settings: DedupSettings

    @property
    def hashes(self) -> list[str]:
        """The kinds of hashes in order: that of the text, then the bands."""
        bands = [f"band {i}" for i in range(self.settings.bands)] if self.settings.near else []
        return ["text"] * self.settings.exact + bands

    @property
    def ranges(self) -> int:
        """Into how many equal ranges the hashes of a kind are cut."""
        return min(-(-self.tasks // TASKS_IN_RANGE), MOST_RANGES)

    @property
    def facts(self) -> dict[str, Any]:
        """What all files of one deduplication have in common."""
        return asdict(self.settings) | {"tasks": self.tasks, "algorithm": ALGORITHM}

    def signatures(self, task: int) -> Path:
        """What a task found in its documents: a table of them, and sorted hashes."""
        return self.work / "signatures" / f"{task:06d}.bin"

    def pairs(self, section: int) -> Path:
        """Documents that share a hash of that section."""
        return self.work / "pairs" / f"{section:06d}.bin"

    def duplicates(self, task: int) -> Path:
        """What a task has to drop."""
        return duplicates_path(self.work, task)

    def open_signatures(self, task: int) -> RecordFile:
        """The file of a task of the first stage, checked to be of this deduplication."""
        return RecordFile.open(self.signatures(task), self.facts, "signatures")


def duplicates_path(work: Path, task: int) -> Path:
    """The list of what a task has to drop."""
    return work / "duplicates" / f"{task:06d}.bin"


class WriteSignatures(PipelineStep):
    """Hashes documents and writes, sorted, which hash belongs to which."""

    type = "DEDUP"
    name = "signatures"

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        """Read all documents of a task and write its file."""
        settings = self.plan.settings
        tables, bands, have_tokens, characters = [], [], [], 0
        for raw in batches(document.text for document in data):
            with self.track_time("batch"):
                texts = [unicodedata.normalize("NFC", text) for text in raw]
                tables.append(_table(texts))
                if settings.near:
                    values, have = band_hashes(texts, settings.ngram, settings.bands, settings.rows, settings.seed)
                    bands.append(values)
                    have_tokens.append(have)
            characters += sum(map(len, raw))
        table = np.concatenate([np.empty(0, DOCUMENT), *tables])
        self.stat_update("documents", value=len(table))
        with self.track_time("batch"), RecordWriter(self.plan.signatures(rank)) as writer:
            writer.section(table)
            if settings.exact:
                self._write_sorted(writer, table["hash"], np.arange(len(table)))
            if settings.near:
                places = np.flatnonzero(np.concatenate([np.empty(0, bool), *have_tokens]))
                values = np.concatenate([np.empty((0, settings.bands), np.uint64), *bands])
                for band in range(settings.bands):
                    self._write_sorted(writer, values[places, band], places)
            writer.finish(self.plan.facts | {"documents": len(table), "characters": characters})

    def _write_sorted(self, writer: RecordWriter, hashes: Nodes, places: npt.NDArray[np.int64]) -> None:
        order = np.argsort(hashes, kind="stable")
        records = np.empty(len(order), HASHED)
        records["hash"], records["document"] = hashes[order], places[order]
        ranges = self.plan.ranges
        borders = np.array([(i << 64) // ranges for i in range(1, ranges)], dtype=np.uint64)
        for part in np.split(records, np.searchsorted(records["hash"], borders)):
            writer.section(part)


def _table(texts: list[str]) -> Records:
    """Hash and length of each text, whitespace counted as one space."""
    table = np.empty(len(texts), DOCUMENT)
    plain = [" ".join(text.split()) for text in texts]
    digests = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in plain)
    table["hash"] = np.frombuffer(b"".join(digests), "<u8")
    table["length"] = [len(text) for text in plain]
    return table


class PairDocuments(PipelineStep):
    """Merges the hashes of all tasks and writes each pair of neighbours that have the same one."""

    type = "DEDUP"
    name = "buckets"

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the pairs of every world_size-th section."""
        plan = self.plan
        with self.track_time("task"):
            for section in range(rank, plan.ranges * len(plan.hashes), world_size):
                with RecordWriter(plan.pairs(section)) as writer:
                    writer.begin()
                    # Section 0 of a file is its table.
                    streams = [plan.open_signatures(task).stream(section + 1, HASHED) for task in range(plan.tasks)]
                    for pairs in _neighbours(merged(streams, MERGED_RECORDS)):
                        writer.add(pairs)
                        self.stat_update("pairs", value=len(pairs))
                    writer.finish(plan.facts)


def _neighbours(blocks: Iterator[tuple[Records, npt.NDArray[np.int64]]]) -> Iterator[Nodes]:
    """Pairs [n, 2] of nodes with equal hashes that follow each other, also over the border of two blocks."""
    last_hash, last_node = np.empty(0, np.uint64), np.empty(0, np.uint64)
    for records, tasks in blocks:
        hashes = np.concatenate([last_hash, records["hash"]])
        nodes = np.concatenate([last_node, node(tasks, records["document"])])
        is_equal = hashes[1:] == hashes[:-1]
        yield np.stack([nodes[:-1][is_equal], nodes[1:][is_equal]], axis=1)
        last_hash, last_node = hashes[-1:], nodes[-1:]


class ListDuplicates(PipelineStep):
    """Joins pairs to clusters and writes for each task what it has to drop, and why."""

    type = "DEDUP"
    name = "clusters"

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        """Read all pairs, write all lists."""
        plan = self.plan
        with self.track_time("task"):
            of_text = plan.ranges * plan.settings.exact
            exact_pairs = spanning_forest(self._pairs(0, of_text))
            near_pairs = self._pairs(of_text, plan.ranges * len(plan.hashes))
            all_pairs = spanning_forest(block for blocks in ([exact_pairs], near_pairs) for block in blocks)

            def ranked(nodes: Nodes) -> list[npt.NDArray[np.integer]]:
                return _longest_first(nodes, plan)

            exact = all_but_one(exact_pairs, ranked)
            near = np.setdiff1d(all_but_one(all_pairs, ranked), exact, assume_unique=True)
            self.stat_update("exact duplicates", value=len(exact))
            self.stat_update("near duplicates", value=len(near))
            for task in range(plan.tasks):
                facts = plan.open_signatures(task).facts
                self.stat_update("documents", value=facts["documents"], unit="task")
                with RecordWriter(plan.duplicates(task)) as writer:
                    for nodes in (exact, near):
                        writer.section(place_of(nodes[_of_task(nodes, task)]).astype("<u4"))
                    writer.finish(facts)

    def _pairs(self, first: int, end: int) -> Iterator[Nodes]:
        for section in range(first, end):
            file = RecordFile.open(self.plan.pairs(section), self.plan.facts, "buckets")
            for block in file.stream(0, "<u8").blocks():
                yield block.reshape(-1, 2)


def _of_task(nodes: Nodes, task: int) -> slice:
    """Where the documents of a task lie among nodes in order."""
    first, end = np.searchsorted(nodes, node(np.array([task, task + 1]), np.zeros(2, dtype=np.uint32)))
    return slice(first, end)


def _longest_first(nodes: Nodes, plan: Plan) -> list[npt.NDArray[np.integer]]:
    """Keys by which the longest text comes first, then the smaller hash."""
    table = np.empty(len(nodes), DOCUMENT)
    for task in range(plan.tasks):
        places = _of_task(nodes, task)
        if places.start < places.stop:
            table[places] = plan.open_signatures(task).read(0, DOCUMENT)[place_of(nodes[places])]
    return [-table["length"].astype(np.int64), table["hash"]]


class DropDuplicates(PipelineStep):
    """Forwards what is no duplicate; `removed`, if given, is called with every other document and the reason.

    It stands in a stage of as many tasks as `dedup_stages` was given, behind `documents_reader` of the same folder.
    """

    type = "DEDUP"
    name = "drop duplicates"

    def __init__(self, work: str, tasks: int, removed: Callable[[Document, str], None] | None = None) -> None:
        super().__init__()
        self.work = Path(work)
        self.tasks = tasks
        self.removed = removed

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Forward the documents of a task; raises DataError where they are not those that were compared."""
        if world_size != self.tasks:
            raise ConfigError(
                f"duplicates are listed for {self.tasks} tasks, this stage has {world_size}: give as many"
            )
        file = RecordFile.open(duplicates_path(self.work, rank), {"tasks": self.tasks}, "clusters")
        compared = file.facts["documents"]
        reasons = np.zeros(compared, dtype=np.uint8)
        for section in (0, 1):
            reasons[file.read(section, "<u4")] = section + 1
        place, characters = -1, 0
        for place, document in enumerate(data):
            if place >= compared:
                break
            with self.track_time():
                characters += len(document.text)
                self.stat_update("total")
                reason = REASONS[reasons[place]]
                self.stat_update(*(["dropped", f"dropped {reason}"] if reason else ["forwarded"]))
                if reason and self.removed is not None:
                    self.removed(document, reason)
            if not reason:
                yield document
        if (place + 1, characters) != (compared, file.facts["characters"]):
            raise DataError(f"the documents of task {rank} are not those compared: remove {self.work} and run it again")
