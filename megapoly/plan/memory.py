"""What the memory of one rank holds, in closed form: parameters, gradients, optimizer state, activations; in bytes.

Activations are what backward passes read, with the fused kernels. T and t are the tokens of a micro-batch that this
rank's matrices see and whose residual stream it holds (under sequence parallel T / tp), H is the hidden size, e the
bytes of an activation and r those of an entry of the residual stream. Temporaries within a pass, the messages between
stages (at most 2 x stages, t H r each, are on their way) and what an allocator wastes are not counted.

tests/plan compares the numbers with a run of the training step itself on tensors without storage.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from megapoly.parallel.schedule import schedule_for
from megapoly.parallel.stage import Stage
from megapoly.plan.communication import redone_layers
from megapoly.plan.seat import Seat
from megapoly.sections import Config

GIB = 2**30
FP32, INT64, INT32, BOOL = 4, 8, 4, 1


@dataclass(frozen=True)
class State:
    """Bytes that stay from step to step; `shard_gradients` are the summed gradients of this rank's shard.

    `word_copy` is the embedding's copy of a tied matrix that all pipeline ranks share, with its fp32 gradient.
    """

    parameters: int
    gradients: int
    shard_gradients: int
    optimizer: int
    word_copy: int

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.parameters + self.gradients + self.shard_gradients + self.optimizer + self.word_copy


def num_parameters(seat: Seat) -> int:
    """Parameters of this rank, the padding of the vocabulary included."""
    return sum(held.size for held in seat.held)


def state_bytes(seat: Seat) -> State:
    """Flat buffers with padding; master weights and AdamW's two moments or Muon's one are divided over the shards.

    Where the shard is the whole buffer its gradients lie there, and in fp32 the parameters are the master weights. A
    bucket's padding goes with its last parameter.
    """
    entries = sum(bucket.size for bucket in seat.buckets)
    shard = entries // seat.shards
    has_master = seat.shards > 1 or seat.element != FP32
    of_muon = seat.owned(lambda held: held.size if seat.uses_muon(held) else 0)
    for bucket in seat.buckets:
        if seat.uses_muon(bucket.held[-1]):
            of_muon += bucket.size // seat.shards - bucket.owned(seat.shard, seat.shards, lambda held: held.size)
    return State(
        parameters=entries * seat.element,
        gradients=entries * FP32,
        shard_gradients=shard * FP32 if seat.shards > 1 else 0,
        optimizer=FP32 * (shard * (3 if has_master else 2) - of_muon),
        word_copy=seat.copied_entries * (seat.element + FP32),
    )


class Piece(NamedTuple):
    """A part of a chunk in the order of the model: what it keeps, and what backward makes again to read it as well."""

    kept: int
    redone: int = 0


def activation_bytes(seat: Seat) -> int:
    """The most that is kept at any time of a step, over the micro-batches in flight on all chunks.

    A backward pass frees its chunk's pieces from the last to the first, each after making again what it redoes. What
    weight gradients that wait (zero-bubble schedules) will read is not counted.
    """
    p, of_chunk = seat.cfg.parallel, [pieces(seat, stage) for stage in seat.stages]
    kept = most = 0
    for action in schedule_for(p.schedule, seat.stage_rank, seat.pp, seat.placement.chunks, seat.microbatches):
        if action.kind == "F":
            kept += sum(piece.kept for piece in of_chunk[action.chunk])
            most = max(most, kept)
        elif action.kind == "H":
            most = max(most, kept + loss_activations(seat, seat.tokens, seat.head_ranks))
        elif action.kind in "BI":
            for piece in reversed(of_chunk[action.chunk]):
                most = max(most, kept + piece.redone)
                kept -= piece.kept
    return most


def pieces(seat: Seat, stage: Stage) -> list[Piece]:
    """What a chunk keeps of one micro-batch between its forward and its backward pass.

    Blocks that are redone as a whole keep the input of their group (t H r), in host memory none; when backward comes to
    them they keep what any block does, of which the input is a part.
    """
    train, layers, block, stream = seat.cfg.train, len(stage.layers), block_activations(seat), _stream(seat)
    size = train.recompute_num_layers if train.recompute_method == "uniform" else 1
    redone = redone_layers(seat, layers)
    groups = [min(size, redone - first) for first in range(0, redone, size)]
    kept = 0 if train.cpu_offloading else stream
    found = [Piece(kept, number * block - kept) for number in groups] + [Piece(block)] * (layers - redone)
    if stage.has_embedding:
        found.insert(0, Piece(embedding_activations(seat)))
    if stage.has_head:
        found.append(Piece(head_activations(seat)))
    return found


def block_activations(seat: Seat) -> int:
    """What one block keeps of a micro-batch.

    A norm keeps the sum that it makes of the residual stream (t H r; in a parallel block both norms read one), its
    statistics, and as the input of the column layer after it, what it gives (t H e). Attention keeps the packed
    queries, keys and values, its output, which is the output layer's input too, and a log-sum-exp of each head; the MLP
    what goes into the activation and what comes out of it. What is redone keeps its input alone.
    """
    m, redone = seat.model, _redone_modules(seat)
    sums = 1 if m.parallel_residual else 2
    norms = sums * _stream(seat)
    if "layernorm" not in redone:
        statistics = 1 if m.normalization == "RMSNorm" else 2
        norms += 2 * seat.own_tokens * (m.hidden_size * seat.element + statistics * FP32)
    heads = m.num_attention_heads // seat.tp
    attention = seat.tokens * (heads + 2 * seat.kv_heads) * m.head_dim * seat.element
    if "core_attn" not in redone:
        attention += seat.tokens * heads * (m.head_dim * seat.element + FP32)
    wide = m.ffn_size // seat.tp
    mlp = seat.tokens * (2 if m.is_gated else 1) * wide * seat.element
    if "mlp_act" not in redone:
        mlp += seat.tokens * wide * seat.element
    return norms + attention + mlp


def embedding_activations(seat: Seat) -> int:
    """The rows that are looked up, and which of them this rank has; of learned positions, their numbers."""
    kept = seat.tokens * (INT64 + BOOL)
    if seat.model.position_embedding_type == "learned_absolute":
        kept += seat.tokens * INT32
    return kept


def head_activations(seat: Seat) -> int:
    """The final norm's sum and statistics, and the loss, which goes there and back at once where all ranks share it."""
    statistics = 1 if seat.model.normalization == "RMSNorm" else 2
    kept = _stream(seat) + seat.own_tokens * statistics * FP32
    return kept if seat.shares_head else kept + loss_activations(seat, seat.own_tokens, seat.tp)


def loss_activations(seat: Seat, tokens: int, ranks: int) -> int:
    """Of the normed hidden states of so many tokens, the gradient, which the fused loss makes going forward.

    Not fused, the states themselves, all logits of this one of `ranks` parts of the vocabulary, and a label, a mask and
    a log-sum-exp of each token.
    """
    kept = tokens * seat.model.hidden_size * seat.element
    if not seat.has_fused_loss:
        kept += seat.tokens * (seat.vocab_rows(ranks) * seat.element + INT64 + 2 * FP32)
    return kept


def stage_configs(cfg: Config) -> dict[str, Config]:
    """The configuration as each stage runs it, with its own sequences and batches, by the stage's name."""
    found = {}
    for stage in cfg.curriculum.stages:
        model = replace(cfg.model, seq_length=stage.seq_length or cfg.model.seq_length)
        batch = stage.global_batch_size or cfg.train.global_batch_size
        found[stage.name] = replace(cfg, model=model, train=replace(cfg.train, global_batch_size=batch))
    return found


def describe_memory(cfg: Config, vocab_size: int, split: tuple[int, ...], world: int) -> str:
    """What the fullest pipeline rank holds in the fullest stage of the curriculum, in one line.

    `split` is the number of layers of each global stage of the pipeline.
    """
    ranks, configs = cfg.parallel.pipeline_model_parallel_size, stage_configs(cfg)
    held = {}
    for name, own in configs.items():
        for rank in range(ranks):
            seat = Seat(own, vocab_size, split, world, rank * world // ranks)
            held[name, rank] = state_bytes(seat), activation_bytes(seat)
    (name, fullest), (state, active) = max(held.items(), key=lambda entry: entry[1][0].bytes + entry[1][1])
    parts = {
        "parameters": state.parameters,
        "fp32 gradients": state.gradients + state.shard_gradients,
        "optimizer": state.optimizer,
        "activations": active,
    }
    if state.word_copy:
        parts["copy of the tied matrix"] = state.word_copy
    told = ", ".join(f"{what} {size / GIB:.3g}" for what, size in parts.items())
    which = f" on pipeline rank {fullest}, the fullest" if ranks > 1 else ""
    if len({activations for (_, rank), (_, activations) in held.items() if rank == fullest}) > 1:
        which += f" in stage '{name}' with sequences of {configs[name].model.seq_length:,}"
    return f"memory a rank{which}: {(state.bytes + active) / GIB:.3g} GiB ({told}), and what passes use and free"


def _stream(seat: Seat) -> int:
    return seat.own_tokens * seat.model.hidden_size * seat.residual


def _redone_modules(seat: Seat) -> frozenset[str]:
    train = seat.cfg.train
    return frozenset(train.recompute_modules if train.recompute_granularity == "selective" else ())
