"""From what is prepared to a run that is ready to step: mesh, model, optimizer, pipeline, loaders."""

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megapoly.data.batch import Documents
from megapoly.data.loader import Deal, TrainLoader, ValidLoader
from megapoly.errors import ConfigError, Echo
from megapoly.log import Console
from megapoly.model.backends import choose_backends
from megapoly.model.count import head_flops, layer_flops
from megapoly.model.head import SharedHead
from megapoly.model.init import initialize
from megapoly.model.transformer import Transformer
from megapoly.optim.groups import Rules
from megapoly.optim.loss_scale import LossScaler
from megapoly.optim.sharded import ShardedOptimizer
from megapoly.parallel.collectives import all_gather
from megapoly.parallel.gradients import FlatBuffers
from megapoly.parallel.mesh import Mesh
from megapoly.parallel.pipeline import Pipeline
from megapoly.parallel.progress import Progress
from megapoly.parallel.rng import key
from megapoly.parallel.schedule import all_lists, placement_for
from megapoly.parallel.stage import Stage, make_stage, split_layers
from megapoly.parallel.tensor import Placement
from megapoly.parallel.timeline import Costs, simulate
from megapoly.sections import Config
from megapoly.train.prepare import Prepared
from megapoly.train.trouble import Watch


def check_agreement(prepared: Prepared, mesh: Mesh) -> None:
    """Refuse ranks that see different data or configurations (a host without the files, say), naming one of them."""
    seen = [prepared.cfg.to_dict(), prepared.plan.fingerprint(), prepared.start_step, prepared.num_samples]
    seen += [None if stream is None else stream.num_tokens for stream in prepared.valid_streams]
    mine = torch.tensor([key(json.dumps(seen))], device=mesh.device)
    everyone = all_gather(mine, mesh.world)
    differing = (everyone != everyone[0]).nonzero()
    if not len(differing):
        return
    what = f"rank {int(differing[0])} sees another configuration, data or checkpoint than rank 0"
    if not mesh.is_main:
        raise Echo(what)
    raise ConfigError(f"{what}: all hosts need the same files under the same paths")


def written_folders(cfg: Config) -> list[str]:
    """The directories that a run writes to, each once: its own and those of its checkpoints."""
    folders = (cfg.logging.run_dir, cfg.checkpoint.save, cfg.checkpoint.save_copy)
    return sorted({os.path.realpath(folder) for folder in folders if folder is not None})


@contextlib.contextmanager
def only_writer(run_dir: str, is_main: bool) -> Iterator[None]:
    """Hold a directory of the run for this job: ConfigError where another job has it, a warning where nobody can."""
    if not is_main:
        yield
        return
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        lock = (Path(run_dir) / ".lock").open("w")
    except OSError as error:
        advice = "give another --run-dir, --save or --save-copy"
        raise ConfigError(f"{run_dir}: cannot be written ({error.strerror}); {advice}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{run_dir}: another job is writing to this run; wait for it, end it or give another --run-dir"
            ) from None
        except OSError as error:  # NFS without its lock daemon, Lustre mounted without flock
            told = f"warning: {run_dir}: has no file locks ({error.strerror}); a second job in it would not be noticed"
            print(told, file=sys.stderr, flush=True)
        yield


@dataclass(frozen=True)
class Run:
    """Everything that a training step needs."""

    prepared: Prepared
    mesh: Mesh
    console: Console
    chunks: list[Transformer]
    head: SharedHead | None
    buffers: FlatBuffers
    optimizer: ShardedOptimizer
    loss_scaler: LossScaler
    watch: Watch
    pipeline: Pipeline
    loader: TrainLoader
    valid_loader: ValidLoader
    progress: Progress

    @property
    def cfg(self) -> Config:
        """The resolved configuration."""
        return self.prepared.cfg

    @property
    def sequence_shards(self) -> int:
        """Ranks among which sequence parallel deals out the tokens of a micro-batch."""
        return self.mesh.tp.size if self.cfg.parallel.sequence_parallel else 1

    def starting_from(self, prepared: Prepared) -> "Run":
        """The same with another checkpoint to start from, and without what its plan leaves out."""
        old = self.loader
        loader = TrainLoader(prepared.plan, old.streams, old.deal, old.sizes, old.documents, old.infilling)
        return dataclasses.replace(self, prepared=prepared, loader=loader)

    def checkpoint_state(self, step: int) -> dict[str, Any]:
        """What state.json keeps beside the tensors."""
        samples = self.prepared.samples_after(step)
        return {
            "step": step,
            "samples": samples,
            "global_batch_size": self.cfg.train.global_batch_size,
            "lr_decay_iters": self.prepared.decay_end,
            "first_steps": [first for first in self.prepared.first_steps if first <= step],
            "optimizer_steps": self.optimizer.num_steps,
            "vocab_size": self.prepared.vocab_size,
            "dtype": self.cfg.precision.parameters,
            "loss_scaler": self.loss_scaler.state(),
            "watch": self.watch.state(),
            "plan_fingerprint": self.prepared.plan.fingerprint(samples),
            "left_out": self.prepared.plan.left_out,
            "source_tokens": [source.tokens for source in self.prepared.plan.sources],
            "source_rows": [source.slices if source.packed else 0 for source in self.prepared.plan.sources],
            "data": self.prepared.data_hashes,
            "layout": {name: getattr(self.mesh, name).size for name in ("tp", "cp", "pp", "dp")},
            "config": self.cfg.to_dict(),
        }


def layer_split(cfg: Config, vocab_size: int) -> list[int]:
    """Layers of each global stage: by hand where given, else by FLOPs with the head's counted, unless all share it."""
    if cfg.parallel.pipeline_layer_split is not None:
        return cfg.parallel.pipeline_layer_split
    costs = [float(layer_flops(cfg.model))] * cfg.model.num_layers
    head = 0.0 if cfg.parallel.shares_head else float(head_flops(cfg.model, vocab_size))
    return split_layers(costs, 0.0, head, cfg.parallel.stages)


def describe_pipeline(cfg: Config, vocab_size: int, dp: int) -> str:
    """Schedule, layers of each stage, and the share of its time that a rank idles, as simulated from FLOPs."""
    m, p, split = cfg.model, cfg.parallel, layer_split(cfg, vocab_size)
    costs = [float(layers * layer_flops(m)) for layers in split]
    head = head_flops(m, vocab_size)
    whole = sum(costs) + head
    costs[-1] += 0 if p.shares_head else head
    shares = tuple(cost * p.pipeline_model_parallel_size / whole for cost in costs)
    microbatches = cfg.train.global_batch_size // (cfg.train.micro_batch_size * dp)
    lists = all_lists(p.schedule, p.pipeline_model_parallel_size, p.chunks, microbatches)
    placement = placement_for(p.schedule, p.pipeline_model_parallel_size, p.chunks)
    idle = simulate(lists, placement, Costs(shares=shares, head=3 * head / whole)).idle_share
    chunks = f" of {p.chunks} chunks" if p.chunks > 1 else ""
    return f"schedule {p.schedule}{chunks}, layers per stage {split}, {idle:.1%} idle (simulated)"


def documents_of(prepared: Prepared) -> Documents | None:
    """What the ends of documents change, None where nothing."""
    data = prepared.cfg.data
    are_apart = data.reset_attention_mask or data.reset_position_ids
    if not are_apart and not data.eod_mask_loss:
        return None
    assert prepared.tokenizer is not None
    return Documents(prepared.tokenizer.eod, are_apart, data.eod_mask_loss)


def build_chunks(
    cfg: Config, vocab_size: int, stages: list[Stage], place: Placement, mesh: Mesh
) -> tuple[list[Transformer], SharedHead | None]:
    """This rank's chunks and its part of a shared head, initialised; what is tied on one rank is one parameter."""
    backends = choose_backends(cfg.precision, place.device)
    head = SharedHead(cfg, vocab_size, mesh, place, backends) if cfg.parallel.shares_head else None
    if head is not None:
        initialize(head, cfg.train.seed)
    word: nn.Module | None = None if head is None or head.tied is None else head.tied.copy
    chunks: list[Transformer] = []
    for stage in stages:
        if cfg.model.tied and stage.has_head and chunks and chunks[0].stage.has_embedding:
            word = chunks[0].embedding["word"]
        chunks.append(Transformer(cfg, vocab_size, stage, place, backends, word))
        initialize(chunks[-1], cfg.train.seed)
    return chunks, head


def build_run(prepared: Prepared, mesh: Mesh, progress: Progress | None = None) -> Run:
    """Model, optimizer, pipeline and loaders of this rank; weights are drawn, no checkpoint is loaded yet.

    `progress` is what a watch over the run looks at; a run that nobody watches has one of its own.
    """
    cfg, m = prepared.cfg, prepared.cfg.model
    dtype = getattr(torch, cfg.precision.parameters)
    split = layer_split(cfg, prepared.vocab_size)
    place = Placement(
        mesh.tp, cfg.parallel.sequence_parallel, dtype, mesh.device, mesh.cp, mesh.kv,
        overlaps_chunks=cfg.parallel.tp_comm_overlap, fp8=cfg.precision.fp8_recipe is not None,
    )  # fmt: skip
    folding = placement_for(cfg.parallel.schedule, mesh.pp.size, cfg.parallel.chunks)
    numbers = [folding.stage_of(mesh.pp.rank, chunk) for chunk in range(folding.chunks)]
    stages = [make_stage(split, number, cfg.parallel.shares_head) for number in numbers]
    chunks, head = build_chunks(cfg, prepared.vocab_size, stages, place, mesh)
    wire = torch.float32 if cfg.precision.accumulate_allreduce_grads_in_fp32 else torch.bfloat16
    parts = chunks if head is None else [*chunks, head]
    has_copies = m.tied and folding.ends_apart and head is None
    buffers = FlatBuffers(parts, mesh, has_copies, cfg.parallel, wire)
    shares = mesh.cp.size * (mesh.tp.size if cfg.parallel.sequence_parallel else 1)
    tokens = cfg.train.micro_batch_size * m.seq_length // shares
    pipeline = Pipeline(
        mesh.pp, cfg.parallel.schedule, folding, (tokens, m.hidden_size), chunks[0].residual_dtype, mesh.device,
        place.weight_gradients, None if head is None else dtype,
    )  # fmt: skip
    deal = Deal(cfg.train.global_batch_size, cfg.train.micro_batch_size, mesh.dp.rank, mesh.dp.size)
    documents = documents_of(prepared)
    assert cfg.data.block_length is not None
    console = Console(mesh.is_main)
    return Run(
        prepared=prepared,
        mesh=mesh,
        console=console,
        chunks=chunks,
        head=head,
        buffers=buffers,
        optimizer=ShardedOptimizer(buffers, Rules(cfg.optimizer, m), chunks[0].backends.adamw),
        loss_scaler=LossScaler.of(cfg.precision),
        watch=Watch(cfg, prepared.vocab_size, buffers, console),
        pipeline=pipeline,
        loader=TrainLoader(prepared.plan, prepared.streams, deal, prepared.batch_sizes, documents, prepared.infilling),
        valid_loader=ValidLoader(prepared.valid_streams, m.seq_length, deal, cfg.train.eval_iters, documents),
        progress=progress or Progress(),
    )


def to_device(array: Any, device: torch.device) -> Tensor:
    """A numpy array of a batch as a tensor on the device; the copy does not wait for the GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
