"""A checkpoint of any layout loads on any other: the same bits on 8 ranks, the same rectangles on 256."""

import math
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from covering import Row, covering
from fake_run import fake_run
from ranks import run_ranks
from tiny_runs import run_to_end, tiny_config, tiny_run, whole_state

from megapoly.checkpoint.load import CheckpointReader, load_checkpoint, plan_reads
from megapoly.checkpoint.state import pieces, training_state
from megapoly.checkpoint.storage import MOST_JSON, TensorRecord, tensor_record
from megapoly.checks import check
from megapoly.config import load_config
from megapoly.errors import ConfigError
from megapoly.model.count import num_parameters
from megapoly.parallel.mesh import Layout, Mesh, make_mesh, single_process_mesh
from megapoly.sections import Config
from megapoly.train.loop import make_saver
from megapoly.train.prepare import resolve
from megapoly.train.step import train_step

WORLD = 8
MODEL = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 104, "num_attention_heads": 8, "bf16": True}
PLAIN: dict[str, Any] = {}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "tp": {str(n): {"tensor_model_parallel_size": n} for n in (1, 2, 4)},
    "pp": {str(n): {"pipeline_model_parallel_size": n} for n in (1, 2, 4)},
    "cp": {str(n): {"context_parallel_size": n} for n in (1, 2)},
    "chunks": {
        "one": PLAIN,
        "two": {"num_virtual_stages_per_pipeline_rank": 2},
        "folded": {"pipeline_schedule": "zb-v", "num_virtual_stages_per_pipeline_rank": 2},
        "a shared head": {"pipeline_vocab_parallel": True},
    },
    "instances": {str(n): {"num_distributed_optimizer_instances": n} for n in (1, 2, 8)},
    "buckets": {"many": {"ddp_bucket_size": 20_000}, "one": {"ddp_bucket_size": 1 << 40}},
}


def leaves(row: Row) -> dict[str, Any]:
    return {name: value for option, label in row.items() for name, value in OPTIONS[option][label].items()}


def layouts(folder: Path, family: str, **options: Any) -> list[Config]:
    """Configurations in which every two values of the options meet that can."""

    def config(row: Row) -> Config:
        return tiny_config(folder, family, 40, **MODEL, **leaves(row), **options)

    def is_possible(row: Row) -> bool:
        if int(row["tp"]) * int(row["pp"]) * int(row["cp"]) > WORLD or (row["pp"], row["chunks"]) == (
            "1",
            "a shared head",
        ):
            return False
        try:
            check(config(row), WORLD)
        except ConfigError:
            return False
        return True

    rows = covering(OPTIONS, is_possible)
    assert all({row[option] for row in rows} == values.keys() for option, values in OPTIONS.items())
    return [config(row) for row in rows]


def through_all(mesh: Mesh, configs: list[Config], folder: Path) -> list[str]:
    """One step on each layout, which hands its state to the next by a checkpoint; what did not arrive."""
    wrong: list[str] = []
    before: dict[str, torch.Tensor] = {}
    for number, cfg in enumerate(configs):
        run = tiny_run(make_mesh(Layout.of(cfg), mesh.device), cfg)
        if before:
            load_checkpoint(CheckpointReader.open(folder / str(number - 1)), run.optimizer)
            now = whole_state(run)
            bad = [name for name in before if not torch.equal(before[name], now[name])]
            wrong += [f"{number}: {bad}"] if bad or before.keys() != now.keys() else []
        train_step(run, number + 1)
        before = {name: tensor.clone() for name, tensor in whole_state(run).items()}
        saver = make_saver(run)
        saver.roots = [folder / str(number)]
        saver.roots[0].mkdir(exist_ok=True)
        dist.barrier()
        saver.save(number + 1, run.checkpoint_state(number + 1))
        saver.finish(number + 1, run.checkpoint_state(number + 1))
        dist.barrier()
    return wrong


@pytest.mark.parametrize(("family", "optimizer"), [("gpt2", "adam"), ("llama", "muon")])
def test_a_state_goes_through_layouts_bit_by_bit(family: str, optimizer: str, tmp_path: Path) -> None:
    configs = layouts(tmp_path, family, optimizer=optimizer)
    assert len(configs) >= 9
    assert run_ranks(through_all, configs, tmp_path, dp=WORLD) == [[]] * WORLD


# The 13B preset on 256 ranks: shapes only

SHARED = {"bf16": True, "micro_batch_size": 1, "global_batch_size": 256}
LARGE: dict[str, dict[str, Any]] = {
    "TP 8 PP 4 DP 8": {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4},
    "TP 4 PP 8 x 2 CP 2 DP 4": {
        "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 8, "context_parallel_size": 2,
        "num_virtual_stages_per_pipeline_rank": 2,
    },
    "TP 2 PP 2 DP 64 in 4 instances": {
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "num_distributed_optimizer_instances": 4,
    },
    "DP 256": {},
}  # fmt: skip
VOCAB = 256_000
RANKS = 256
CHUNK_BYTES = 100  # of a chunk in metadata.json, with its share of names and shapes


def large(name: str) -> Config:
    cfg = resolve(load_config("polylm-13b", SHARED | LARGE[name]), has_cuda=True)
    check(cfg, RANKS)
    return cfg


def planned(name: str) -> tuple[dict[str, TensorRecord], list[int]]:
    """What metadata.json would list after a save on 256 ranks, and how many bytes each rank writes."""
    cfg, tensors, written = large(name), {}, []
    for rank in range(RANKS):
        with fake_run(cfg, VOCAB, RANKS, rank) as run:
            mine = pieces(run.buffers, training_state(run.optimizer), for_saving=True)
        begin = 0
        for p in mine:
            entry = tensors.setdefault(p.name, {"dtype": "float32", "shape": list(p.shape), "chunks": []})
            chunk = [list(p.offsets), list(p.tensor.shape), f"shard_{rank:05d}.safetensors", begin, 0]
            entry["chunks"].append(chunk)
            begin += p.tensor.nbytes
        written.append(begin)
    return {name: tensor_record(entry) for name, entry in tensors.items()}, written  # no holes and no overlaps


@pytest.mark.parametrize("name", ["TP 4 PP 8 x 2 CP 2 DP 4", "TP 2 PP 2 DP 64 in 4 instances"])
def test_13b_on_256_ranks_is_saved_once_and_loads_on_every_other_layout(name: str) -> None:
    records, written = planned(name)
    entries = num_parameters(large(name).model, VOCAB)
    assert sum(written) == 3 * 4 * entries  # fp32 master weights and two moments
    busy = [size for size in written if size]
    assert max(busy) < 2 * sum(busy) / len(busy)  # ends of a pipeline hold the embedding as well
    listed = sum(len(record.chunks) for record in records.values())
    assert listed * CHUNK_BYTES < MOST_JSON / 20, "a real metadata.json is far below what is read of one"
    largest = max(math.prod(record.shape) for record in records.values()) * 4
    assert max(record.num_bytes(chunk) for record in records.values() for chunk in record.chunks) <= largest
    for other in LARGE:
        for rank in (201,):
            with fake_run(large(other), VOCAB, RANKS, rank) as run:
                wanted = pieces(run.buffers, training_state(run.optimizer), for_saving=False)
            reads = plan_reads(records, wanted)
            found = [common(p, read.chunk) for read in reads for p in read.pieces]
            assert min(found) > 0, "a chunk is read in vain"
            assert sum(found) == sum(p.tensor.numel() for p in wanted), (other, rank)
            assert len({(read.name, read.chunk.offsets) for read in reads}) == len(reads), "a chunk is read twice"


def common(p: Any, chunk: Any) -> int:
    sides = zip(p.offsets, p.tensor.shape, chunk.offsets, chunk.sizes, strict=True)
    return math.prod(min(o + size, c + s) - max(o, c) for o, size, c, s in sides)


def load_and_measure(mesh: Mesh, cfg: Config) -> tuple[int, int]:
    """The most memory that Python and numpy (not torch) held during a load, and the bytes of the largest chunk read."""
    reader = CheckpointReader.open(cfg.logging.run_dir)
    run = tiny_run(mesh, cfg)
    wanted = pieces(run.buffers, training_state(run.optimizer), for_saving=False)
    largest = max(reader.records[read.name].num_bytes(read.chunk) for read in plan_reads(reader.records, wanted))
    tracemalloc.start()
    load_checkpoint(reader, run.optimizer)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak, largest


def test_a_load_takes_the_memory_of_one_chunk_beside_its_shard(tmp_path: Path) -> None:
    """On another layout; on the same one chunks go straight to their places."""
    cfg = tiny_config(tmp_path, "gpt2", 2, hidden_size=288)
    run_to_end(single_process_mesh(), cfg)
    whole = sum(path.stat().st_size for path in (tmp_path / "run").rglob("shard_*"))
    for peak, largest in run_ranks(load_and_measure, cfg, dp=2):
        assert whole > 8 * largest
        assert largest <= peak < largest + 500_000, (peak, largest)
    peak, largest = load_and_measure(single_process_mesh(), cfg)
    assert peak < 500_000 < largest
