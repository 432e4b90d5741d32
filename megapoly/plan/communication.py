"""The collectives of one training step of one rank, in closed form: how many, over which axis, and how many bytes.

Bytes are those of the largest tensor of a call: what is summed (all-reduce, reduce-scatter), what comes together
(all-gather), the message (broadcast, send, recv), one rank's part (gather, scatter). T and t are the tokens of a
micro-batch that this rank's matrices see and whose residual stream it holds (under sequence parallel T / tp), H is the
hidden size, e the bytes of an activation, r those of an entry of the residual stream. An axis of one rank has no
collectives.

tests/plan compares every number with a run of the training step itself on a fake process group.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from megapoly.optim.muon import deal, flops
from megapoly.parallel.schedule import Action
from megapoly.parallel.stage import Stage
from megapoly.plan.seat import WORD, Held, Seat

FUSED_LOSS_TOKENS = 2048  # tokens whose logits exist at a time
OVERLAP_CHUNKS = 4  # parts of a product under tp_comm_overlap
BF16, FP32, FP64 = 2, 4, 8  # bytes
VERDICT = 3  # numbers that say whether a step is taken: loss, gradient norm, first parameter that is not finite


class Calls(NamedTuple):
    """A number of calls and the bytes of all of them together."""

    number: int = 0
    bytes: int = 0

    def times(self, number: int) -> "Calls":
        """So many times these."""
        return Calls(number * self.number, number * self.bytes)


Traffic = Mapping[tuple[str, str], Calls]  # by axis and kind


def total(*parts: Traffic) -> dict[tuple[str, str], Calls]:
    """The sum of several, without what has no calls."""
    found: dict[tuple[str, str], Calls] = {}
    for part in parts:
        for key, calls in part.items():
            before = found.get(key, Calls())
            if calls.number:
                found[key] = Calls(before.number + calls.number, before.bytes + calls.bytes)
    return found


def times(number: int, part: Traffic) -> Traffic:
    """So many times a part."""
    return {key: calls.times(number) for key, calls in part.items()}


def step_traffic(seat: Seat, num_sources: int) -> dict[tuple[str, str], Calls]:
    """Everything that a rank says in one training step, by (axis, kind)."""
    parts = [*(chunk_traffic(seat, stage) for stage in seat.stages), shared_head_traffic(seat)]
    of_chunks = [times(seat.microbatches, part) for part in parts]
    return total(*of_chunks, pipeline_traffic(seat), tied_matrix_traffic(seat), gradient_traffic(seat),
                 muon_traffic(seat), scalar_traffic(seat, num_sources))  # fmt: skip


def chunk_traffic(seat: Seat, stage: Stage) -> Traffic:
    """One micro-batch forward and backward through a chunk.

    The embedding leaves tensor parallelism once: forward T H e are summed, scattered under sequence parallel, where
    backward gathers the gradient again. What is recomputed repeats the forward collectives of its blocks.
    """
    layers, redone = len(stage.layers), redone_layers(seat, len(stage.layers))
    parts = [times(layers + redone, block_forward(seat)), times(layers, block_backward(seat))]
    attention_only = seat.cfg.train.recompute_granularity == "selective" and (
        "core_attn" in seat.cfg.train.recompute_modules
    )
    parts.append(times(layers + (layers if attention_only else redone), key_gather(seat)))
    parts.append(times(layers, key_gradients(seat)))
    if stage.has_embedding:
        parts += [_leave(seat)]
        parts += [_gather(seat)] if seat.is_sequence_parallel else []
    if stage.has_head and not stage.shares_head:
        parts.append(loss_traffic(seat))
    return total(*parts)


def redone_layers(seat: Seat, layers: int) -> int:
    """How many whole blocks of a chunk are run again in its backward pass."""
    train = seat.cfg.train
    if train.recompute_granularity != "full":
        return 0
    return layers if train.recompute_method == "uniform" else min(layers, train.recompute_num_layers)


def block_forward(seat: Seat) -> Traffic:
    """Forward of a block: two column layers enter tensor parallelism and two row layers leave it.

    Under sequence parallel entering gathers T H e and leaving scatters the sum of as many; else only leaving talks.
    """
    enter = times(2, _gather(seat, _pieces(seat))) if seat.is_sequence_parallel else {}
    return total(enter, times(2, _leave(seat, _pieces(seat))))


def block_backward(seat: Seat) -> Traffic:
    """Backward of a block: the mirror image, and under sequence parallel the columns' inputs once more.

    A column layer keeps its t tokens only and gathers all of them again for its weight's gradient.
    """
    summed = times(2, _leave(seat, _pieces(seat)))
    if not seat.is_sequence_parallel:
        return summed
    return total(summed, times(2, _gather(seat, _pieces(seat))), times(2, _gather(seat)))


def key_gather(seat: Seat) -> Traffic:
    """Context parallel: one gather of the keys and values of whole sequences, for a pass through a block."""
    return {("cp", "all_gather"): Calls(1, _key_bytes(seat))} if seat.cp > 1 else {}


def key_gradients(seat: Seat) -> Traffic:
    """Context parallel, backward: keys and values are gathered again, and their gradients summed and dealt out."""
    return total(key_gather(seat), {("cp", "reduce_scatter"): Calls(1, _key_bytes(seat))}) if seat.cp > 1 else {}


def _key_bytes(seat: Seat) -> int:
    return seat.all_tokens * 2 * seat.kv_heads * seat.model.head_dim * seat.element


def loss_traffic(seat: Seat) -> Traffic:
    """Head and loss: three fp32 scalars of each token from each rank, and what the head's product needs.

    Fused, chunks of n tokens: under sequence parallel each is gathered, and the gradient of the input scattered as it
    is summed; else that is summed alone. Not fused, the head is one column layer.
    """
    if seat.tp == 1:
        return {}
    pieces = -(-seat.own_tokens // _chunk_tokens(seat)) if seat.has_fused_loss else 1
    scalars = {("tp", "all_gather"): Calls(pieces, seat.tp * 3 * seat.tokens * FP32)}
    if not seat.is_sequence_parallel:
        return total(scalars, _leave(seat, pieces))
    gathers = _gather(seat, pieces) if seat.has_fused_loss else times(2, _gather(seat))
    return total(scalars, gathers, _leave(seat, pieces))


def shared_head_traffic(seat: Seat) -> Traffic:
    """A head that all pipeline ranks share: what enters it, t H e, comes from the last one and is gathered to T H e.

    Then each chunk of tokens sums the gradient of that over pipeline and tensor-parallel ranks, beside the scalars.
    """
    if not seat.shares_head:
        return {}
    ranks, pieces = seat.head_ranks, -(-seat.tokens // FUSED_LOSS_TOKENS) if seat.has_fused_loss else 1
    found: dict[tuple[str, str], Calls] = {}
    if seat.pp > 1:
        found["pp", "broadcast"] = Calls(1, seat.own_tokens * seat.model.hidden_size * seat.element)
    if seat.is_sequence_parallel:
        found["tp", "all_gather"] = Calls(1, _activation_bytes(seat))
    if ranks > 1:
        found["vocab", "all_gather"] = Calls(pieces, ranks * 3 * seat.tokens * FP32)
        found["vocab", "all_reduce"] = Calls(pieces, _activation_bytes(seat))
    return found


def _chunk_tokens(seat: Seat) -> int:
    return FUSED_LOSS_TOKENS // (seat.tp if seat.is_sequence_parallel else 1)


def _pieces(seat: Seat) -> int:
    """In how many parts a product and its collective go under tp_comm_overlap."""
    if not seat.cfg.parallel.tp_comm_overlap:
        return 1
    size = -(-seat.own_tokens // OVERLAP_CHUNKS)
    return -(-seat.own_tokens // size)


def _gather(seat: Seat, pieces: int = 1) -> Traffic:
    """T H e from this rank's t."""
    return {("tp", "all_gather"): Calls(pieces, _activation_bytes(seat))} if seat.tp > 1 else {}


def _leave(seat: Seat, pieces: int = 1) -> Traffic:
    """The sum of T H e over the tensor-parallel ranks, under sequence parallel scattered."""
    kind = "reduce_scatter" if seat.is_sequence_parallel else "all_reduce"
    return {("tp", kind): Calls(pieces, _activation_bytes(seat))} if seat.tp > 1 else {}


def _activation_bytes(seat: Seat) -> int:
    return seat.tokens * seat.model.hidden_size * seat.element


def pipeline_traffic(seat: Seat) -> Traffic:
    """Messages of t H r: of each micro-batch, from every chunk to the next one's rank and back."""
    message = seat.own_tokens * seat.model.hidden_size * seat.residual
    sends = receives = 0
    for chunk in range(seat.placement.chunks):
        for kind in ("F", "B"):
            action = Action(kind, 0, chunk)
            sent, taken = seat.placement.sent(seat.stage_rank, action), seat.placement.taken(seat.stage_rank, action)
            sends += sent is not None and sent.target != seat.stage_rank
            receives += taken is not None and taken.source != seat.stage_rank
    m = seat.microbatches
    return {("pp", "send"): Calls(m * sends, m * sends * message),
            ("pp", "recv"): Calls(m * receives, m * receives * message)}  # fmt: skip


def tied_matrix_traffic(seat: Seat) -> Traffic:
    """A tied matrix that all pipeline ranks share is gathered for the embedding; its gradient is dealt out in fp32."""
    entries = seat.tied_entries
    if not entries:
        return {}
    return {("pp", "gather"): Calls(1, entries * seat.element), ("pp", "scatter"): Calls(1, entries * FP32)}


def gradient_traffic(seat: Seat) -> Traffic:
    """Each bucket's gradients are scattered over the shards, its part summed over the instances, parameters gathered.

    What this rank owns of gradients that are partial over tensor-parallel ranks (norms, row biases and positions under
    sequence parallel) is summed in one all-reduce; so are copied keys and values, and a tied matrix with the other end.
    """
    wire = FP32 if seat.cfg.precision.accumulate_allreduce_grads_in_fp32 else BF16
    sizes = [bucket.size for bucket in seat.buckets]
    number, entries = len(sizes), sum(sizes)
    found: dict[tuple[str, str], Calls] = {}
    if seat.shards > 1:
        found["shards", "reduce_scatter"] = Calls(number, entries * wire)
        found["shards", "all_gather"] = Calls(number, entries * seat.element)
    if seat.instances > 1:
        found["instances", "all_reduce"] = Calls(number, entries // seat.shards * wire)
    summed: dict[str, Callable[[Held], int]] = {
        "tp": lambda held: 0 if held.is_split or not seat.is_sequence_parallel else held.size,
        "kv": lambda held: held.copied,
        "embedding": lambda held: held.size if held.name == WORD and seat.shares_tied_matrix else 0,
    }
    for axis, entries_of in summed.items():
        if owned := seat.owned(entries_of):
            found[axis, "all_reduce"] = Calls(1, FP32 * owned)
    return found


def muon_traffic(seat: Seat) -> Traffic:
    """Muon: momenta of the buckets that have matrices of blocks are gathered, in bf16, and their directions scattered.

    Each shard orthogonalises the matrices that it is dealt, after gathering them over the tensor-parallel ranks.
    """
    buckets = [bucket for bucket in seat.buckets if any(map(seat.uses_muon, bucket.held))]
    moved = Calls(len(buckets), BF16 * sum(bucket.size for bucket in buckets))
    found = {("shards", kind): moved for kind in ("all_gather", "reduce_scatter") if seat.shards > 1}
    matrices = [held for bucket in buckets for held in bucket.held if seat.uses_muon(held)]
    hands = deal([flops(held.shape) for held in matrices], seat.shards)
    mine = [held.size for held, hand in zip(matrices, hands, strict=True) if hand == seat.shard]
    gathered = {("tp", "all_gather"): Calls(len(mine), seat.tp * BF16 * sum(mine))} if seat.tp > 1 else {}
    return total(found, gathered)


def scalar_traffic(seat: Seat, num_sources: int) -> Traffic:
    """The number of tokens (fp32), and in fp64 two global norms, losses and tokens of each source, a step's verdict."""
    of_sources = 2 * num_sources * FP64
    found: dict[tuple[str, str], Calls] = {}
    if seat.dp * seat.cp > 1:
        found["replicas", "all_reduce"] = Calls(2, FP32 + of_sources)
    if seat.pp > 1:
        found["pp", "all_reduce"] = Calls(1, of_sources)
    if seat.world > 1:
        found["world", "all_reduce"] = Calls(3, (2 + VERDICT) * FP64)
    return found
