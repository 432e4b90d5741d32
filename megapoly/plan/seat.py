"""What one rank of a layout holds, in numbers: its place on the axes, its stages, and how its parameters are stored.

Nothing here builds a model or needs torch. Sizes count entries unless they are called bytes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megapoly.checks import padded_vocab_size
from megapoly.model.count import parameter_shapes
from megapoly.parallel.schedule import Placement, placement_for
from megapoly.parallel.stage import Stage, make_stage
from megapoly.sections import Config, ModelConfig

ALIGNMENT = 64  # entries: parts of a bucket begin at multiples of it
WORD = "embedding.word.weight"
SPLIT = ("embedding.word.", "head.", "attention.qkv.", "attention.output.weight", "mlp.up.", "mlp.down.weight")


@dataclass(frozen=True)
class Held:
    """A parameter of the whole `shape` as a rank holds it: `size` local entries.

    `is_split`: tensor-parallel ranks hold different entries, but for the last `copied` (keys and values where there are
    more ranks than key/value heads).
    """

    name: str
    shape: tuple[int, ...]
    size: int
    is_split: bool
    copied: int = 0

    @property
    def is_matrix(self) -> bool:
        """Whether it is stored with the matrices, before biases and norms."""
        return len(self.shape) > 1 and not self.name.endswith("bias")

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether it is a matrix of a block."""
        return self.is_matrix and self.name.startswith("layers.")


@dataclass(frozen=True)
class Bucket:
    """A part of the flat buffers: `size` entries with padding, cut into equal parts over the shards.

    `held` are its parameters in the order of their entries: matrices first.
    """

    held: tuple[Held, ...]
    size: int

    def owned(self, shard: int, shards: int, last: Callable[[Held], int]) -> int:
        """How many entries of a shard's part are among the last so many of each parameter."""
        begin, end = self.size // shards * shard, self.size // shards * (shard + 1)
        position = entries = 0
        for held in self.held:
            position += held.size
            entries += max(min(end, position) - max(begin, position - last(held)), 0)
        return entries


@dataclass(frozen=True)
class Seat:
    """The place of one rank; `split` is the number of layers of each global stage."""

    cfg: Config
    vocab_size: int
    split: tuple[int, ...]
    world: int
    rank: int

    @property
    def model(self) -> ModelConfig:
        return self.cfg.model

    # Axes. Neighbouring ranks differ in tensor, then context, data and pipeline coordinate.

    @property
    def tp(self) -> int:
        return self.cfg.parallel.tensor_model_parallel_size

    @property
    def kv(self) -> int:
        """Tensor-parallel ranks that hold the same key/value head."""
        return max(self.tp // self.model.num_kv_heads, 1)

    @property
    def kv_heads(self) -> int:
        """Key/value heads of this rank."""
        return max(self.model.num_kv_heads // self.tp, 1)

    @property
    def cp(self) -> int:
        return self.cfg.parallel.context_parallel_size

    @property
    def pp(self) -> int:
        return self.cfg.parallel.pipeline_model_parallel_size

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.cp * self.pp)

    @property
    def instances(self) -> int:
        return self.cfg.parallel.num_distributed_optimizer_instances

    @property
    def shards(self) -> int:
        """Ranks among which optimizer state is divided."""
        return self.dp * self.cp // self.instances

    @property
    def shard(self) -> int:
        """This rank's number among them: data, then context coordinate, within its instance."""
        return self.rank // self.tp % (self.dp * self.cp) % self.shards

    @property
    def stage_rank(self) -> int:
        """This rank's number in the pipeline."""
        return self.rank // (self.tp * self.cp * self.dp)

    # The work of a step

    @property
    def is_sequence_parallel(self) -> bool:
        return self.cfg.parallel.sequence_parallel

    @property
    def element(self) -> int:
        """Bytes of an entry of a parameter or an activation."""
        return 2 if self.cfg.precision.bf16 or self.cfg.precision.fp16 else 4

    @property
    def residual(self) -> int:
        """Bytes of an entry of the residual stream."""
        return 4 if self.cfg.precision.fp32_residual_connection else self.element

    @property
    def has_fused_loss(self) -> bool:
        """Whether logits exist for a chunk of tokens at a time only."""
        return self.cfg.precision.loss_backend in ("auto", "fused_linear")

    @property
    def microbatches(self) -> int:
        return self.cfg.train.global_batch_size // (self.cfg.train.micro_batch_size * self.dp)

    @property
    def all_tokens(self) -> int:
        """Tokens of a micro-batch, on all context-parallel ranks."""
        return self.cfg.train.micro_batch_size * self.model.seq_length

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that this rank's matrices see."""
        return self.all_tokens // self.cp

    @property
    def own_tokens(self) -> int:
        """Tokens of a micro-batch whose residual stream this rank holds."""
        return self.tokens // self.tp if self.is_sequence_parallel else self.tokens

    @property
    def shares_head(self) -> bool:
        """Whether all pipeline ranks hold a part of the output matrix."""
        return self.cfg.parallel.shares_head

    @property
    def head_ranks(self) -> int:
        """Among how many ranks the rows of the output matrix are divided."""
        return self.tp * self.pp if self.shares_head else self.tp

    def vocab_rows(self, ranks: int) -> int:
        """Rows that each of so many ranks holds of a matrix of the vocabulary, with its padding."""
        return padded_vocab_size(self.vocab_size, self.cfg.tokenizer.make_vocab_size_divisible_by, ranks) // ranks

    @property
    def placement(self) -> Placement:
        return placement_for(self.cfg.parallel.schedule, self.pp, self.cfg.parallel.chunks)

    @property
    def stages(self) -> list[Stage]:
        """The global stages of this rank's chunks."""
        numbers = [self.placement.stage_of(self.stage_rank, chunk) for chunk in range(self.placement.chunks)]
        return [make_stage(self.split, number, self.shares_head) for number in numbers]

    @property
    def has_both_ends(self) -> bool:
        """Whether this rank has the embedding as well as the head."""
        return any(s.has_embedding for s in self.stages) and any(s.has_head for s in self.stages)

    @property
    def shares_tied_matrix(self) -> bool:
        """Whether this rank holds one of two copies of a tied matrix."""
        has_one = any(s.has_embedding or s.has_head for s in self.stages)
        return self.model.tied and has_one and not self.has_both_ends and not self.shares_head

    @property
    def tied_entries(self) -> int:
        """Entries of this rank's rows of a tied matrix that all pipeline ranks share; 0 without one."""
        if not (self.model.tied and self.shares_head):
            return 0
        return self.vocab_rows(self.head_ranks) * self.model.hidden_size

    @property
    def copied_entries(self) -> int:
        """Entries of the embedding's copy of such a matrix: all pipeline ranks' rows, on the first."""
        return self.pp * self.tied_entries if self.stage_rank == 0 else 0

    # Parameters

    @property
    def held(self) -> list[Held]:
        """The parameters of this rank in the order of its chunks and of the model; a shared matrix once."""
        found: dict[str, Held] = {}
        for stage in self.stages:
            for name, shape in parameter_shapes(self.model, self.vocab_size):
                if _is_in(stage, name, self.model.tied):
                    found.setdefault(name, self._held(name, shape))
        if self.shares_head:
            name = WORD if self.model.tied else "head.weight"
            found[name] = self._held(name, (self.vocab_size, self.model.hidden_size))
        return list(found.values())

    def _held(self, name: str, shape: tuple[int, ...]) -> Held:
        is_split = any(part in name for part in SPLIT)
        if self.kv > 1 and "attention.qkv." in name:  # a part of one group's queries, and its key and value
            head = math.prod(shape[2:])
            return Held(name, shape, ((shape[1] - 2) // self.kv + 2) * head, is_split, 2 * head)
        if name in (WORD, "head.weight"):
            rows = self.vocab_rows(self.tp if name == WORD and not self.model.tied else self.head_ranks)
            return Held(name, shape, rows * shape[1], is_split)
        return Held(name, shape, math.prod(shape) // (self.tp if is_split else 1), is_split)

    def uses_muon(self, held: Held) -> bool:
        """Whether Muon updates a parameter; AdamW does else."""
        return self.cfg.optimizer.optimizer == "muon" and held.is_hidden_matrix

    def owned(self, last: Callable[[Held], int]) -> int:
        """How many entries of this rank's shard are among the last so many of each parameter."""
        return sum(bucket.owned(self.shard, self.shards, last) for bucket in self.buckets)

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets of the flat buffers, the model's last parameters first; see parallel/buckets.py.

        A bucket is closed by the parameter that brings it to ddp_bucket_size; the word embedding is one by itself, and
        with one replica all is one. Each is padded so that the parts of all shards are equal and aligned.
        """
        held = self.held
        if self.dp * self.cp == 1:
            return [self._bucket(held)]
        groups: list[list[Held]] = []
        room = 0
        for one in reversed([h for h in held if h.name != WORD]):
            if room <= 0:
                groups.append([])
                room = self.cfg.parallel.ddp_bucket_size
            groups[-1].append(one)
            room -= one.size
        word = [h for h in held if h.name == WORD]
        return [self._bucket(group[::-1]) for group in [*groups, word] if group]

    def _bucket(self, held: Sequence[Held]) -> Bucket:
        unit = self.shards * ALIGNMENT
        return Bucket(tuple(sorted(held, key=lambda h: not h.is_matrix)), -(-sum(h.size for h in held) // unit) * unit)


def _is_in(stage: Stage, name: str, tied: bool) -> bool:
    part, _, rest = name.partition(".")
    if part == "layers":
        return int(rest.split(".")[0]) in stage.layers
    if name == WORD:
        return not (tied and stage.shares_head) and (stage.has_embedding or (stage.has_head and tied))
    if name == "head.weight":
        return stage.has_head and not stage.shares_head
    return stage.has_embedding if part == "embedding" else stage.has_head
