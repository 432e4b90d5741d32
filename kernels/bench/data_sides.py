"""The two sides of the data benchmark: megapoly and megatron-core open the same files in processes of their own."""

import multiprocessing
import struct
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

LANGUAGES = 18
SHARES = [400, 120, 80, 60, 50, 50, 40, 40, 30, 30, 20, 20, 20, 10, 10, 10, 5, 5]
LENGTH, VOCAB = 2048, 50_000
WINDOW = 4096  # samples of a batch, as the loader looks them up


@dataclass(frozen=True)
class Case:
    """A data set: its files hold documents of `length` tokens, or of 1 to twice 2,048 where `lengths_vary`."""

    name: str
    files: int
    documents: int
    samples: int
    length: int = 0
    lengths_vary: bool = False


# ------------------------------------------------------------------------------------------------------------- files


def write_case(case: Case, folder: Path) -> None:
    """The files of a case. Every .bin is a hole; an .idx is whole where lengths vary, else a header and its ends."""
    rng = np.random.default_rng(0)
    for number in range(case.files):
        n, prefix = case.documents // case.files, folder / f"{number:04d}"
        with open(f"{prefix}.idx", "wb") as index:
            index.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, n, n + 1))
            if case.lengths_vary:
                lengths = rng.integers(1, 2 * LENGTH, n, dtype=np.int32)
                ends = 2 * np.cumsum(lengths, dtype=np.int64)
                total = int(ends[-1])
                for column in (lengths, ends - 2 * lengths, np.arange(n + 1, dtype=np.int64)):
                    index.write(column.tobytes())
            else:
                total = 2 * case.length * n
                for position, layout, value in (
                    (34 + 4 * (n - 1), "<i", case.length),
                    (34 + 4 * n + 8 * (n - 1), "<q", total - 2 * case.length),
                    (34 + 12 * n + 8 * n, "<q", n),
                ):
                    index.seek(position)
                    index.write(struct.pack(layout, value))
        with open(f"{prefix}.bin", "wb") as tokens:
            tokens.truncate(total)


def paths_of(case: Case, folder: Path) -> list[list[str]]:
    """Prefixes by language: as even as they come."""
    prefixes = [str(folder / f"{number:04d}") for number in range(case.files)]
    return [prefixes[i::LANGUAGES] for i in range(min(LANGUAGES, case.files))]


# ------------------------------------------------------------------------------------------- in the measured processes


class Megapoly:
    """megapoly's own opening and loader."""

    def __init__(self, case: Case, folder: Path) -> None:
        import megapoly.data.curriculum
        import megapoly.data.loader  # noqa: F401  # imports are not part of opening

        self.case, self.folder = case, folder

    def open(self) -> None:
        """As a run opens its data: files, both ends against the vocabulary, the plan, the first samples."""
        from megapoly.data.curriculum import make_plan, open_sources
        from megapoly.data.loader import Deal, TrainLoader
        from megapoly.sections import Config, CurriculumConfig, DataConfig, ModelConfig, Source, Stage

        paths = paths_of(self.case, self.folder)
        names = ["en", *(f"{chr(97 + i)}x" for i in range(len(paths) - 1))]
        sources = [Source(name=name, language=name, paths=files) for name, files in zip(names, paths, strict=True)]
        shares = dict(zip(names, map(float, SHARES), strict=False))
        half = self.case.samples // 2 * LENGTH
        stages = [
            Stage(name="one", tokens=half, weights=shares),
            Stage(name="two", tokens=half, weights=shares | {"en": 300.0}),
        ]
        cfg = Config(
            model=ModelConfig(seq_length=LENGTH),
            data=DataConfig(sources=sources),
            curriculum=CurriculumConfig(stages=stages),
        )
        streams = open_sources(cfg, VOCAB)
        for stream in streams:
            stream.check_vocab(VOCAB)
        plan = make_plan(cfg, [stream.num_tokens for stream in streams])
        self.loader = TrainLoader(plan, streams, Deal(8, 8, 0, 1))
        self.sampler, self.streams = plan.sampler(), streams
        self.sampler.samples(0, min(WINDOW, plan.num_samples))

    def look_up(self, begin: int, count: int) -> None:
        """Source, epoch and slice of so many samples, in batches."""
        for first in range(begin, begin + count, WINDOW):
            self.sampler.samples(first, min(first + WINDOW, begin + count))

    def read(self, begin: int, count: int) -> None:
        """Their tokens, from where they are known to be."""
        sources, _, offsets = self.sampler.samples(begin, begin + count)
        for source, offset in zip(sources.tolist(), offsets.tolist(), strict=True):
            self.streams[source].read(offset * LENGTH, (offset + 1) * LENGTH + 1)

    def batch(self, begin: int, count: int) -> None:
        """Whole training samples: order, tokens, labels and masks, 8 at a time."""
        for first in range(begin, begin + count, 8):
            self.loader.batch(first, first + 8)


class MegatronCore:
    """megatron-core's blend of GPTDatasets, with masks made by the attention and everything else as it comes."""

    def __init__(self, case: Case, folder: Path) -> None:
        import megatron.core.datasets.blended_megatron_dataset_builder
        import megatron.core.datasets.gpt_dataset  # noqa: F401
        import torch.distributed as dist

        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())  # it asks for its rank
        self.case, self.folder = case, folder

    def open(self) -> None:
        """The blend, built or read from the cache."""
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        prefixes = [path for files in paths_of(self.case, self.folder) for path in files]
        weights = [float(share) for share in SHARES[: len(prefixes)]]
        config = GPTDatasetConfig(
            random_seed=1, sequence_length=LENGTH, blend=(prefixes, weights), split="1,0,0",
            path_to_cache=str(self.folder / "cache"), tokenizer=Ids(), reset_position_ids=False,
            reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        )  # fmt: skip
        builder = BlendedMegatronDatasetBuilder(GPTDataset, [self.case.samples, 0, 0], lambda: True, config)
        self.blend = builder.build()[0]

    def look_up(self, begin: int, count: int) -> None:
        """Data set, place in its shuffle and first document of so many samples, in batches."""
        for first in range(begin, begin + count, WINDOW):
            chosen = slice(first, min(first + WINDOW, begin + count))
            sets, numbers = self.blend.dataset_index[chosen], self.blend.dataset_sample_index[chosen]
            for number in np.unique(sets):
                dataset = self.blend.datasets[number]
                shuffled = dataset.shuffle_index[numbers[sets == number]]
                dataset.document_index[dataset.sample_index[shuffled, 0]]

    def read(self, begin: int, count: int) -> None:
        """Their tokens, through the indices."""
        for n in range(begin, begin + count):
            dataset = self.blend.datasets[self.blend.dataset_index[n]]
            dataset._query_document_sample_shuffle_indices(self.blend.dataset_sample_index[n])

    def batch(self, begin: int, count: int) -> None:
        """Whole training samples, as its loader takes them."""
        for n in range(begin, begin + count):
            self.blend[n]


class Ids:
    """What GPTDataset asks of a tokenizer."""

    eod, pad, vocab_size = 0, 0, VOCAB
    unique_identifiers = {"class": "ids"}


def resident(field: str) -> int:
    """Resident memory of this process in bytes: VmRSS now, VmHWM at most so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def serve(kind: type, case: Case, folder: Path, asked: Connection) -> None:
    """Answer (method, arguments) with the seconds it took, opening with its memory as well, until None."""
    try:
        one = kind(case, folder)
        before = resident("VmRSS")
        asked.send(None)
        while (question := asked.recv()) is not None:
            name, arguments = question
            begin, cpu = time.perf_counter(), time.process_time()
            getattr(one, name)(*arguments)
            seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
            asked.send((seconds, cpu, resident("VmRSS") - before, resident("VmHWM") - before))
    except EOFError:  # the process that measures is gone
        sys.exit(1)
    except Exception:  # whatever it is, the process that measures reports it and goes on
        asked.send(traceback.format_exc())


# ----------------------------------------------------------------------------------------- in the process that measures


class Failed(Exception):
    """A process that stopped; the message is its traceback."""


class Contestant:
    """A process that serves one side of a case; imports are done when it stands."""

    def __init__(self, kind: type, case: Case, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._end, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(kind, case, folder, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._end.recv()
        except EOFError:
            raise Failed("a process ended") from None
        if isinstance(answer, str):
            raise Failed(answer)
        return answer

    def ask(self, name: str, *arguments: int) -> tuple[float, float, int, int]:
        """Seconds, of which on a processor, growth of resident memory since the imports, and the most of it."""
        self._end.send((name, arguments))
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._end.close()
        self._process.join(timeout=20)
        if self._process.is_alive():
            self._process.kill()


def opened(kind: type, case: Case, folder: Path) -> tuple[Contestant, dict[str, Any]]:
    """A process that has opened the case, and what that took."""
    one = Contestant(kind, case, folder)
    seconds, cpu, growth, most = one.ask("open")
    return one, {"seconds": seconds, "cpu_seconds": cpu, "mb": growth / 1e6, "peak_mb": most / 1e6}
