"""From what is prepared to a run that is ready to step: mesh, model, optimizer, pipeline, loaders."""

import contextlib
import fcntl
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapoly.data.loader import Deal, TrainLoader, ValidLoader
from megapoly.errors import ConfigError
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
from megapoly.parallel.rng import key
from megapoly.parallel.schedule import all_lists, placement_for
from megapoly.parallel.stage import Stage, make_stage, split_layers
from megapoly.parallel.tensor import Placement
from megapoly.parallel.timeline import Costs, simulate
from megapoly.sections import Config
from megapoly.train.prepare import Prepared


def check_agreement(prepared: Prepared, mesh: Mesh) -> None:
    """Refuse ranks that see different data or configurations (a host without the files, say), naming one of them."""
    seen = [prepared.cfg.to_dict(), prepared.plan.fingerprint(), prepared.start_step, prepared.num_samples]
    seen += [None if stream is None else stream.num_tokens for stream in prepared.valid_streams]
    mine = torch.tensor([key(json.dumps(seen))], device=mesh.device)
    everyone = all_gather(mine, mesh.world)
    if (everyone != everyone[0]).any() and mesh.is_main:
        other = int((everyone != everyone[0]).nonzero()[0])
        raise ConfigError(
            f"rank {other} sees another configuration, data or checkpoint than rank 0: "
            "all hosts need the same files under the same paths"
        )
    if (everyone != everyone[0]).any():
        time.sleep(20)  # rank 0 speaks; the launcher ends the others when it is gone


@contextlib.contextmanager
def only_writer(run_dir: str, is_main: bool) -> Iterator[None]:
    """Hold the run's directory for this job; ConfigError where another job has it."""
    if not is_main:
        yield
        return
    try:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        lock = (Path(run_dir) / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"run_dir {run_dir}: cannot be written ({error.strerror}); give another --run-dir") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{run_dir}: another job is writing to this run; wait for it, end it or give another --run-dir"
            ) from None
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
    pipeline: Pipeline
    loader: TrainLoader
    valid_loader: ValidLoader

    @property
    def cfg(self) -> Config:
        """The resolved configuration."""
        return self.prepared.cfg

    @property
    def sequence_shards(self) -> int:
        """Ranks among which sequence parallel deals out the tokens of a micro-batch."""
        return self.mesh.tp.size if self.cfg.parallel.sequence_parallel else 1

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
            "plan_fingerprint": self.prepared.plan.fingerprint(samples),
            "source_tokens": [source.tokens for source in self.prepared.plan.sources],
            "data": self.prepared.data_hashes,
            "layout": {name: getattr(self.mesh, name).size for name in ("tp", "cp", "pp", "dp")},
            "config": self.cfg.to_dict(),
        }


def layer_split(cfg: Config, vocab_size: int) -> list[int]:
    """Layers of each global stage: by hand where given, else by FLOPs with the head's counted, unless all share it."""
    if cfg.parallel.pipeline_layer_split is not None:
        return cfg.parallel.pipeline_layer_split
    costs = [float(layer_flops(cfg.model))] * cfg.model.num_layers
    head = 0.0 if cfg.parallel.pipeline_vocab_parallel else float(head_flops(cfg.model, vocab_size))
    return split_layers(costs, 0.0, head, cfg.parallel.stages)


def describe_pipeline(cfg: Config, vocab_size: int, dp: int) -> str:
    """Schedule, layers of each stage, and the share of its time that a rank idles, as simulated from FLOPs."""
    m, p, split = cfg.model, cfg.parallel, layer_split(cfg, vocab_size)
    costs = [float(layers * layer_flops(m)) for layers in split]
    head = head_flops(m, vocab_size)
    whole = sum(costs) + head
    costs[-1] += 0 if p.pipeline_vocab_parallel else head
    shares = tuple(cost * p.pipeline_model_parallel_size / whole for cost in costs)
    microbatches = cfg.train.global_batch_size // (cfg.train.micro_batch_size * dp)
    lists = all_lists(p.schedule, p.pipeline_model_parallel_size, p.chunks, microbatches)
    placement = placement_for(p.schedule, p.pipeline_model_parallel_size, p.chunks)
    idle = simulate(lists, placement, Costs(shares=shares, head=3 * head / whole)).idle_share
    chunks = f" of {p.chunks} chunks" if p.chunks > 1 else ""
    return f"schedule {p.schedule}{chunks}, layers per stage {split}, {idle:.1%} idle (simulated)"


def build_chunks(cfg: Config, vocab_size: int, stages: list[Stage], place: Placement) -> list[Transformer]:
    """This rank's parts of the model, initialised; embedding and tied head of one rank are one parameter."""
    backends = choose_backends(cfg.precision, place.device)
    chunks: list[Transformer] = []
    for stage in stages:
        word = chunks[0].embedding["word"] if stage.has_head and chunks and chunks[0].stage.has_embedding else None
        chunks.append(Transformer(cfg, vocab_size, stage, place, backends, word if cfg.model.tied else None))
        initialize(chunks[-1], cfg.train.seed)
    return chunks


def build_run(prepared: Prepared, mesh: Mesh) -> Run:
    """Model, optimizer, pipeline and loaders of this rank; weights are drawn, no checkpoint is loaded yet."""
    cfg, m = prepared.cfg, prepared.cfg.model
    dtype = getattr(torch, cfg.precision.parameters)
    split = layer_split(cfg, prepared.vocab_size)
    place = Placement(
        mesh.tp, cfg.parallel.sequence_parallel, dtype, mesh.device, mesh.cp, mesh.kv,
        overlaps_chunks=cfg.parallel.tp_comm_overlap, fp8=cfg.precision.fp8_recipe is not None,
    )  # fmt: skip
    folding = placement_for(cfg.parallel.schedule, mesh.pp.size, cfg.parallel.chunks)
    numbers = [folding.stage_of(mesh.pp.rank, chunk) for chunk in range(folding.chunks)]
    stages = [make_stage(split, number, cfg.parallel.pipeline_vocab_parallel) for number in numbers]
    chunks = build_chunks(cfg, prepared.vocab_size, stages, place)
    head = None
    if cfg.parallel.pipeline_vocab_parallel:
        head = SharedHead(cfg, prepared.vocab_size, mesh.vocab, place, chunks[0].backends)
        initialize(head, cfg.train.seed)
    wire = torch.float32 if cfg.precision.accumulate_allreduce_grads_in_fp32 else torch.bfloat16
    parts = chunks if head is None else [*chunks, head]
    buffers = FlatBuffers(parts, mesh, m.tied and folding.ends_apart, cfg.parallel, wire)
    shares = mesh.cp.size * (mesh.tp.size if cfg.parallel.sequence_parallel else 1)
    tokens = cfg.train.micro_batch_size * m.seq_length // shares
    pipeline = Pipeline(
        mesh.pp, cfg.parallel.schedule, folding, (tokens, m.hidden_size), chunks[0].residual_dtype, mesh.device,
        place.weight_gradients, None if head is None else dtype,
    )  # fmt: skip
    deal = Deal(cfg.train.global_batch_size, cfg.train.micro_batch_size, mesh.dp.rank, mesh.dp.size)
    return Run(
        prepared=prepared,
        mesh=mesh,
        console=Console(mesh.is_main),
        chunks=chunks,
        head=head,
        buffers=buffers,
        optimizer=ShardedOptimizer(buffers, Rules(cfg.optimizer, m), chunks[0].backends.adamw),
        loss_scaler=LossScaler.of(cfg.precision),
        pipeline=pipeline,
        loader=TrainLoader(prepared.plan, prepared.streams, deal, prepared.batch_sizes),
        valid_loader=ValidLoader(prepared.valid_streams, m.seq_length, deal, cfg.train.eval_iters),
    )


def to_device(array: Any, device: torch.device) -> Tensor:
    """A numpy array of a batch as a tensor on the device; the copy does not wait for the GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
