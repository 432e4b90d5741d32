"""The decoder-only transformer, or the part of it that one pipeline stage holds."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from megapoly_kernels import Backends, LocalChunks, Sequences, rotary_table
from torch import Tensor, nn

from megapoly.checks import padded_vocab_size
from megapoly.model.attention import RotaryTable
from megapoly.model.block import Block, joined
from megapoly.model.dropout import Dropout
from megapoly.model.norm import Norm
from megapoly.model.offload import HostMemory
from megapoly.model.recompute import redone, redone_groups, redone_modules
from megapoly.parallel.context import chunks_of
from megapoly.parallel.linear import ColumnParallelLinear, column_parallel_linear
from megapoly.parallel.stage import Stage
from megapoly.parallel.tensor import (
    Placement,
    VocabParallelEmbedding,
    sharded_parameter,
)
from megapoly.sections import Config, ModelConfig


class PositionEmbedding(nn.Module):
    """Learned absolute positions, whole on every rank."""

    def __init__(self, m: ModelConfig, place: Placement) -> None:
        super().__init__()
        shape = (m.max_positions, m.hidden_size)
        self.weight = sharded_parameter(shape, None, place, "normal", is_partial=place.sequence_parallel)

    def forward(self, positions_t: Tensor) -> Tensor:
        """Positions [tokens] -> [tokens, hidden]."""
        return F.embedding(positions_t, self.weight)


class Transformer(nn.Module):
    """Embedding, blocks and head, as far as this stage has them.

    Parameters have their global names (`layers.7.attention.qkv.weight` on whichever stage). A tied head on a later
    stage than the embedding holds `word`, the embedding of another chunk of this rank, or else a copy of it. Where
    all ranks share a tied head, `word` is the embedding, which looks up in a copy of its rows.
    """

    def __init__(
        self, cfg: Config, vocab_size: int, stage: Stage, place: Placement, backends: Backends,
        word: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        m = cfg.model
        self.m, self.data, self.stage, self.vocab_size, self.backends = m, cfg.data, stage, vocab_size, backends
        self.place = dataclasses.replace(place, fp8=False)  # FP8 is for the blocks: logits keep their precision
        self.dropout, self.seed = cfg.train.hidden_dropout, cfg.train.seed
        self.residual_dtype = torch.float32 if cfg.precision.fp32_residual_connection else place.dtype
        padded = padded_vocab_size(vocab_size, cfg.tokenizer.make_vocab_size_divisible_by, place.tp.size)
        self.embedding = nn.ModuleDict()
        if stage.has_embedding or (stage.has_head and m.tied and not stage.shares_head):
            self.embedding["word"] = word or VocabParallelEmbedding(vocab_size, padded, m.hidden_size, place)
        if stage.has_embedding and m.position_embedding_type == "learned_absolute":
            self.embedding["position"] = PositionEmbedding(m, place)
        modules = redone_modules(cfg.train)
        self.layers = nn.ModuleDict({str(i): Block(m, place, backends, modules, i) for i in stage.layers})
        if cfg.train.torch_compile:
            for block in self.layers.values():  # not the module: its hooks, which wait for parameters, stay outside
                block.forward = torch.compile(block.forward)
        self.groups = redone_groups([self.layers[str(i)] for i in stage.layers], cfg.train)
        self.host = HostMemory(place.device) if cfg.train.cpu_offloading else None
        if stage.has_head:
            self.final_norm = Norm(m, place, backends)
            if not m.tied and not stage.shares_head:
                self.head = ColumnParallelLinear((vocab_size, m.hidden_size), 0, place, bias=False, padded=padded)
        self.table: tuple[Tensor, Tensor] | None = None
        if m.rotary_dim:
            self.table = rotary_table(m.max_positions, m.rotary_dim, m.rotary_base, place.device)

    @property
    def head_weight(self) -> nn.Parameter:
        """This rank's rows of the output matrix, [vocabulary rows, hidden]."""
        weight = self.embedding["word"].weight if self.m.tied else self.head.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(
        self,
        tokens_BS: Tensor,
        hidden_tH: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        begin_B: Tensor | None = None,
    ) -> Tensor:
        """Run this stage: token ids [batch, sequence], on later stages also the residual stream received.

        Under context parallel the ids are this rank's chunks of each sequence (see parallel/context.py). `cu_seqlens`,
        int32 [documents + 1], is where documents begin in the flat whole sequences, for what is reset with them.
        `begin_B`, int64, is the number of each sequence's first token in the run; nothing is dropped without it.

        Returns the residual stream for the next stage, [tokens of this rank, hidden], or after the last block the
        normed hidden states.
        """
        sequences, position_T = self._sequences(tokens_BS, cu_seqlens)
        table = None if self.table is None else (*self.table, position_T)
        drop = None if begin_B is None or not self.dropout else self._dropout(begin_B, tokens_BS.shape[1])
        residual_tH = self._embed(tokens_BS, sequences, position_T, drop) if hidden_tH is None else hidden_tH
        branch_tH: Tensor | None = None
        for blocks, is_redone in self.groups:
            if is_redone:
                run = partial(self._run_whole, blocks, sequences, table, drop)
                branch_tH, (residual_tH,) = None, redone(run, joined(branch_tH, residual_tH), host=self.host)
            else:
                branch_tH, residual_tH = self._run(blocks, sequences, table, drop, branch_tH, residual_tH)
        if self.stage.has_head:
            normed_tH, _ = self.final_norm(branch_tH, residual_tH)
            result: Tensor = normed_tH
            # muP's factor of the logits: the head is linear, so that what enters it may carry the factor.
            return result / self.m.width_multiple if self.m.use_mup else result
        return joined(branch_tH, residual_tH)

    def _run(
        self,
        blocks: Sequence[nn.Module],
        sequences: Sequences | LocalChunks,
        table: RotaryTable | None,
        drop: Dropout | None,
        branch_tH: Tensor | None,
        residual_tH: Tensor,
    ) -> tuple[Tensor | None, Tensor]:
        for block in blocks:
            branch_tH, residual_tH = block(branch_tH, residual_tH, sequences, table, drop)
        return branch_tH, residual_tH

    def _run_whole(
        self, blocks: Sequence[nn.Module], sequences: Sequences | LocalChunks, table: RotaryTable | None,
        drop: Dropout | None, residual_tH: Tensor,
    ) -> tuple[Tensor]:  # fmt: skip
        return (joined(*self._run(blocks, sequences, table, drop, None, residual_tH)),)

    def _dropout(self, begin_B: Tensor, length: int) -> Dropout:
        """What tells this rank's tokens apart, in the order in which they lie in the residual stream."""
        cp, tp = self.place.cp, self.place.tp
        place_t = torch.arange(length * cp.size, device=begin_B.device)
        if cp.size > 1:
            place_t = place_t.view(2 * cp.size, -1)[list(chunks_of(cp.rank, cp.size))].flatten()
        token_t = (begin_B[:, None] + place_t).flatten()
        if self.place.sequence_parallel:
            token_t = token_t.chunk(tp.size)[tp.rank]
        return Dropout(self.dropout, self.seed, token_t)

    def _sequences(self, tokens_BS: Tensor, cu_seqlens: Tensor | None) -> tuple[Sequences | LocalChunks, Tensor | None]:
        """Which tokens see each other, and the positions of the tokens where those are not their places in it."""
        cp, (batch, length), device = self.place.cp, tokens_BS.shape, tokens_BS.device
        length *= cp.size
        whole = Sequences(length)
        documents = whole if cu_seqlens is None else Sequences.packed(cu_seqlens, batch * length)
        seen = documents if self.data.reset_attention_mask else whole
        counted = documents if self.data.reset_position_ids else whole
        position_T = None if counted is seen else counted.positions(batch * length, device)
        if cp.size == 1:
            return seen, position_T
        local = LocalChunks.of(seen, batch, length, chunks_of(cp.rank, cp.size), 2 * cp.size, device)
        if position_T is not None:
            local = dataclasses.replace(local, position_t=position_T.index_select(0, local.own_t))
        return local, None

    def _embed(
        self, tokens_BS: Tensor, sequences: Sequences | LocalChunks, position_T: Tensor | None, drop: Dropout | None
    ) -> Tensor:
        hidden_tH: Tensor = self.embedding["word"](tokens_BS.flatten())
        if "position" in self.embedding:
            if position_T is None:
                position_T = sequences.positions(tokens_BS.numel(), tokens_BS.device)
            if self.place.sequence_parallel:
                position_T = position_T.chunk(self.place.tp.size)[self.place.tp.rank]
            hidden_tH = hidden_tH + self.embedding["position"](position_T)
        if drop is not None:
            hidden_tH = drop(hidden_tH, 2 * self.m.num_layers)
        return hidden_tH.to(self.residual_dtype)

    def logits(self, normed_tH: Tensor) -> Tensor:
        """Normed hidden states -> this rank's columns of the logits, [all tokens, vocabulary rows of this shard]."""
        return column_parallel_linear(normed_tH, self.head_weight, None, self.place)
