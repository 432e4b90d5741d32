"""The training step, on one screen."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from megapoly.data.batch import Batch
from megapoly.model.head import SharedHead
from megapoly.model.loss import masked_losses
from megapoly.model.transformer import Transformer
from megapoly.optim.clip import clip_coefficient
from megapoly.parallel.collectives import all_reduce_
from megapoly.parallel.context import local_batch
from megapoly.train.setup import Run, to_device


@dataclass(frozen=True)
class StepStats:
    """What a step leaves behind, still on the device: nothing here waits for it (but for fp16's skipped_steps).

    `by_source` is fp64 [2, sources]: sums of token losses and numbers of unmasked tokens over the whole global batch,
    the same on every rank.
    """

    by_source: Tensor
    grad_norm: Tensor
    params_norm: Tensor
    lr: float
    loss_scale: float
    skipped_steps: int


def train_step(run: Run, step: int) -> StepStats:
    """One optimizer step: micro-batches through the pipeline, one gradient reduction, one update.

    Where loss or gradients are not finite, or the policy on spikes says so, the update changes nothing on any rank.
    """
    begin = time.perf_counter()
    whole = run.loader.batch(run.prepared.samples_after(step - 1), run.prepared.samples_after(step))
    run.progress.loading += time.perf_counter() - begin
    batches = [local_batch(batch, run.mesh.cp) for batch in whole]
    by_source = torch.zeros(2, len(run.prepared.streams), dtype=torch.float64, device=run.mesh.device)
    scale = run.loss_scaler.scale
    num_tokens = torch.full((), float(sum(b.mask.sum() for b in batches)), device=run.mesh.device)
    all_reduce_(num_tokens, run.mesh.replicas).clamp_(min=1)  # a batch may be all padding

    run.buffers.begin(len(batches))
    run_pipeline(run, batches, num_tokens / scale, by_source)
    owned_grad = run.buffers.finish()

    by_source = sum_over_stages(run, by_source)
    grad_norm = run.optimizer.global_norm(owned_grad) / scale
    is_sound = run.watch.judge(step, by_source, grad_norm, owned_grad, run.loss_scaler)
    clip = clip_coefficient(grad_norm, run.cfg.optimizer.clip_grad)
    lr = run.prepared.learning_rate(step)
    if step in run.prepared.reset_steps:
        run.optimizer.reset()
    if run.loss_scaler.accepts(grad_norm):
        run.optimizer.step(owned_grad, lr, torch.where(is_sound, clip / scale, torch.nan))
    params_norm = run.optimizer.global_norm(run.optimizer.master)
    return StepStats(by_source, grad_norm, params_norm, lr, scale, run.loss_scaler.skipped_steps)


def run_pipeline(run: Run, batches: list[Batch], num_tokens: Tensor, by_source: Tensor) -> None:
    """Micro-batches through the pipeline, and back where gradients are enabled; the last stage counts losses."""
    tied = None if run.head is None else run.head.tied

    def forward(chunk: int, i: int, hidden: Tensor | None) -> Tensor:
        model = run.chunks[chunk]
        borders, begins = (
            None if x is None else to_device(x, run.mesh.device) for x in (batches[i].cu_seqlens, batches[i].begins)
        )
        output: Tensor = model(to_device(batches[i].tokens, run.mesh.device), hidden, borders, begins)
        is_scored = model.stage.has_head and run.head is None
        return objective_of(run, model, output, batches[i], num_tokens, by_source) if is_scored else output

    def head(i: int, normed_tH: Tensor) -> Tensor | None:
        assert run.head is not None
        normed_TH = run.head(normed_tH).requires_grad_(torch.is_grad_enabled())
        objective = objective_of(run, run.head, normed_TH, batches[i], num_tokens, by_source)
        if not torch.is_grad_enabled():
            return None
        objective.backward()
        return run.head.own(normed_TH.grad)

    run.pipeline.set_tokens(batches[0].tokens.size // run.sequence_shards)
    if tied is not None:
        tied()
    run.pipeline.run(len(batches), forward, head)
    if tied is not None and torch.is_grad_enabled():
        tied.collect()


def objective_of(
    run: Run, model: Transformer | SharedHead, normed: Tensor, batch: Batch, num_tokens: Tensor, by_source: Tensor
) -> Tensor:
    """What a micro-batch adds to the loss; the rank of the last stage counts its token losses by source."""
    mask_BS = to_device(batch.mask, run.mesh.device)
    labels_BS = to_device(batch.labels, run.mesh.device)
    objective, losses_BS = masked_losses(model, normed, labels_BS, mask_BS, num_tokens)
    if run.mesh.pp.rank != run.pipeline.last_rank:
        return objective
    sources_B = to_device(batch.sources, run.mesh.device)
    is_of_source_NB = torch.arange(by_source.shape[1], device=run.mesh.device)[:, None] == sources_B
    by_source[0] += (is_of_source_NB * losses_BS.double().sum(1)).sum(1)  # index_add_ is not deterministic on a GPU
    by_source[1] += (is_of_source_NB * mask_BS.double().sum(1)).sum(1)
    return objective


def sum_over_stages(run: Run, by_source: Tensor) -> Tensor:
    """Complete the per-source sums over data- and context-parallel ranks, and bring them from the last stage to all."""
    return all_reduce_(all_reduce_(by_source, run.mesh.replicas), run.mesh.pp)


@torch.no_grad()
def evaluate(run: Run) -> Tensor:
    """Sums of held-out token losses and their counts, fp64 [2, sources]; weights and data order stay untouched."""
    by_source = torch.zeros(2, len(run.prepared.streams), dtype=torch.float64, device=run.mesh.device)
    one = torch.ones((), device=run.mesh.device)
    for number in range(run.valid_loader.num_batches):
        run.progress.beat()
        batches = [local_batch(batch, run.mesh.cp) for batch in run.valid_loader.batch(number)]
        run_pipeline(run, batches, one, by_source)
    return sum_over_stages(run, by_source)
