"""Checks that config alone can answer; they run before any process group exists, so that every rank ends alike."""

import dataclasses

from megapoly.errors import ConfigError
from megapoly.run_checks import (
    at_least_zero,
    bounded,
    check_batches,
    check_checkpoints,
    check_rates,
    check_resilience,
    multiples,
    positive,
)
from megapoly.sections import Config, ModelConfig, ParallelConfig, PrecisionConfig, Stage, TrainConfig

RATES = ("lr", "min_lr", "lr_warmup_iters", "lr_warmup_init")


def check_model(m: ModelConfig) -> None:
    """Refuse sizes that no transformer can have."""
    positive(
        num_layers=m.num_layers, hidden_size=m.hidden_size, ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads, num_query_groups=m.num_query_groups, kv_channels=m.kv_channels,
        seq_length=m.seq_length, init_method_std=m.init_method_std, mup_base_hidden_size=m.mup_base_hidden_size,
        norm_epsilon=m.norm_epsilon, rotary_base=m.rotary_base,
    )  # fmt: skip
    bounded(
        2**24, hidden_size=m.hidden_size, ffn_hidden_size=m.ffn_size, kv_channels=m.kv_channels,
        seq_length=m.seq_length, max_position_embeddings=m.max_position_embeddings,
    )  # fmt: skip
    bounded(2**10, num_layers=m.num_layers)
    bounded(2**16, num_attention_heads=m.num_attention_heads)
    if m.kv_channels is None and m.hidden_size % m.num_attention_heads:
        raise ConfigError(
            f"num_attention_heads ({m.num_attention_heads}) must divide hidden_size ({m.hidden_size}), "
            "or give kv_channels"
        )
    if m.num_attention_heads % m.num_kv_heads:
        raise ConfigError(
            f"num_query_groups ({m.num_kv_heads}) must divide num_attention_heads ({m.num_attention_heads})"
        )
    if m.use_mup and m.init_method != "normal":
        raise ConfigError(
            f"use_mup scales init_method_std with the width: it needs init_method normal, not {m.init_method}"
        )
    if m.max_positions < m.seq_length:
        raise ConfigError(f"max_position_embeddings ({m.max_positions}) must be at least seq_length ({m.seq_length})")
    if m.position_embedding_type == "rope":
        if not 0 < m.rotary_percent <= 1:
            raise ConfigError(f"rotary_percent ({m.rotary_percent}) must lie in (0, 1]")
        if m.rotary_dim % 2 or m.rotary_dim == 0:
            raise ConfigError(
                f"rotary_percent ({m.rotary_percent}) of head_dim ({m.head_dim}) gives {m.rotary_dim} channels; "
                "it must give an even number of at least 2"
            )


def check_pipeline(m: ModelConfig, p: ParallelConfig) -> None:
    """Refuse a schedule for another number of chunks, and stages that no layer is left for."""
    pp, chunks = p.pipeline_model_parallel_size, p.num_virtual_stages_per_pipeline_rank
    positive(pipeline_model_parallel_size=pp, num_virtual_stages_per_pipeline_rank=chunks)
    if p.pipeline_vocab_parallel and (p.pipeline_schedule not in (None, "1f1b") or p.chunks > 1):
        asked = f"pipeline_schedule {p.pipeline_schedule}"
        if p.pipeline_schedule in (None, "1f1b"):
            asked = f"num_virtual_stages_per_pipeline_rank {p.chunks}"
        raise ConfigError(f"pipeline_vocab_parallel has a schedule of its own, a 1f1b: leave out {asked}")
    wanted = {"zb-v": 2, "interleaved": p.chunks}.get(p.schedule, 1)
    if p.chunks != wanted:
        raise ConfigError(
            f"num_virtual_stages_per_pipeline_rank ({p.chunks}) must be {wanted} for pipeline_schedule {p.schedule}; "
            f"{'interleaved' if p.chunks > 1 else '1f1b'} takes {p.chunks}"
        )
    if p.stages > m.num_layers + 2:
        fewer = max((n for n in range(1, (m.num_layers + 2) // p.chunks + 1) if pp % n == 0), default=0)
        raise ConfigError(
            f"pipeline_model_parallel_size ({pp}) x num_virtual_stages_per_pipeline_rank ({p.chunks}) = {p.stages} "
            f"stages are too many for num_layers ({m.num_layers}): only the first and the last may have none; "
            + (f"pipeline_model_parallel_size {fewer} would do" if fewer else "use fewer chunks")
        )
    split = p.pipeline_layer_split
    if split is not None and (
        len(split) != p.stages or sum(split) != m.num_layers or min(split) < 0 or 0 in split[1:-1]
    ):
        raise ConfigError(
            f"pipeline_layer_split {split} must name {p.stages} stages (pipeline_model_parallel_size {pp} x {p.chunks} "
            f"on each), not {len(split)}, that sum to num_layers ({m.num_layers}), not {sum(split)}; "
            "only the first and the last may have none"
        )


def check_context(cfg: Config) -> None:
    """Refuse sequences that cannot be dealt out to context-parallel ranks: each holds two of 2 x cp equal chunks."""
    cp, length = cfg.parallel.context_parallel_size, cfg.model.seq_length
    positive(context_parallel_size=cp)
    chunks = 2 * cp
    if cp == 1 or length % chunks == 0:
        return
    fewer = next(size for size in range(min(cp - 1, length), 0, -1) if size == 1 or length % (2 * size) == 0)
    raise ConfigError(
        f"context_parallel_size ({cp}) cuts sequences into {chunks} chunks, which seq_length ({length:,}) does not "
        f"divide into: use seq_length {multiples(length, chunks)}, or context_parallel_size {fewer}"
    )


def check_tensor_parallel(m: ModelConfig, tp: int) -> None:
    """Refuse a number of tensor-parallel ranks that the heads or the feed-forward width cannot be dealt to."""

    def misfit(tp: int) -> str:
        if m.num_attention_heads % tp:
            return f"must divide num_attention_heads ({m.num_attention_heads})"
        if m.num_kv_heads % tp and tp % m.num_kv_heads:
            return f"must divide num_query_groups ({m.num_kv_heads}) or be a multiple of it"
        return f"must divide ffn_hidden_size ({m.ffn_size})" if m.ffn_size % tp else ""

    if found := misfit(tp):
        nearest = min((n for n in range(1, m.num_attention_heads + 1) if not misfit(n)), key=lambda n: abs(n - tp))
        raise ConfigError(f"tensor_model_parallel_size ({tp}) {found}; nearest that works: {nearest}")


def check_fp8(cfg: Config) -> None:
    """Refuse sizes that FP8 products cannot have: what a rank multiplies comes in multiples of 16."""
    m, tp = cfg.model, cfg.parallel.tensor_model_parallel_size
    if cfg.precision.fp8_recipe is None:
        return
    if cfg.parallel.tp_comm_overlap:
        raise ConfigError(
            f"fp8_recipe {cfg.precision.fp8_recipe} does not go with tp_comm_overlap: leave out one of them"
        )
    query = m.num_attention_heads // tp * m.head_dim
    packed = query + 2 * max(m.num_kv_heads // tp, 1) * m.head_dim
    for name, value, share, ranks in (("hidden_size", m.hidden_size, m.hidden_size, 1),
                                      ("ffn_hidden_size", m.ffn_size, m.ffn_size // tp, tp),
                                      ("kv_channels", m.head_dim, query, 1),
                                      ("kv_channels", m.head_dim, packed, 1)):  # fmt: skip
        if share % 16:
            nearest = multiples(value, 16 * ranks)
            raise ConfigError(
                f"fp8_recipe ({cfg.precision.fp8_recipe}) multiplies matrices of multiples of 16: {name} ({value}) "
                f"gives {share} on each of {tp} tensor-parallel ranks; use {name} {nearest}"
            )


def check_layout(cfg: Config, world_size: int) -> int:
    """Refuse a layout that does not divide the model or the world; returns the data-parallel size."""
    m, p, t = cfg.model, cfg.parallel, cfg.train
    tp, cp, pp = p.tensor_model_parallel_size, p.context_parallel_size, p.pipeline_model_parallel_size
    positive(tensor_model_parallel_size=tp)
    check_tensor_parallel(m, tp)
    check_fp8(cfg)
    check_pipeline(m, p)
    check_context(cfg)
    if world_size % (tp * cp * pp):
        context = f"context_parallel_size ({cp}) x " if cp > 1 else ""
        raise ConfigError(
            f"tensor_model_parallel_size ({tp}) x {context}pipeline_model_parallel_size ({pp}) = {tp * cp * pp} "
            f"must divide the world size ({world_size}): start {multiples(world_size, tp * cp * pp)} ranks"
        )
    if p.sequence_parallel and tp == 1:
        raise ConfigError("sequence_parallel needs tensor_model_parallel_size above 1 (it is 1)")
    check_sequence_parallel(cfg)
    if p.tp_comm_overlap and not p.sequence_parallel:
        raise ConfigError("tp_comm_overlap needs sequence_parallel, whose collectives it overlaps: turn both on")
    dp = world_size // (tp * cp * pp)
    check_batches(t, dp)
    return dp


def check_sequence_parallel(cfg: Config) -> None:
    """Refuse micro-batches whose tokens cannot be dealt out to tensor-parallel ranks."""
    p, tokens = cfg.parallel, cfg.train.micro_batch_size * cfg.model.seq_length
    tp, cp = p.tensor_model_parallel_size, p.context_parallel_size
    if p.sequence_parallel and (tokens // cp) % tp:
        shared = " / context_parallel_size" if cp > 1 else ""
        raise ConfigError(
            f"sequence_parallel: tensor_model_parallel_size ({tp}) must divide "
            f"micro_batch_size x seq_length{shared} ({tokens // cp})"
        )


def block_length_of(cfg: Config) -> int:
    """Tokens of a sample: as configured, else of a stage's longest sequence; the sequences of all must divide it."""
    stages = cfg.curriculum.stages or [Stage(name="", tokens=0)]
    lengths = [stage.seq_length or cfg.model.seq_length for stage in stages]
    length = max(lengths) if cfg.data.block_length is None else cfg.data.block_length
    for stage, sequence in zip(stages, lengths, strict=True):
        whose = "" if stage.seq_length is None else f"stage '{stage.name}': "
        positive(block_length=length, seq_length=sequence)
        if length % sequence:
            raise ConfigError(
                f"{whose}seq_length ({sequence}) must divide block_length ({length}), the tokens of a sample: "
                f"block_length {multiples(length, sequence)} would do"
            )
    return length


def check_stages(cfg: Config, dp: int) -> None:
    """Refuse stages with rates that cannot be, or with batches or sequences that model or layout cannot have."""
    block = block_length_of(cfg)
    for stage in cfg.curriculum.stages:
        length = stage.seq_length or cfg.model.seq_length
        train = dataclasses.replace(cfg.train, global_batch_size=stage.global_batch_size or cfg.train.global_batch_size)
        model = dataclasses.replace(cfg.model, seq_length=length, max_position_embeddings=cfg.model.max_positions)
        own = dataclasses.replace(cfg, model=model, train=dataclasses.replace(train, rampup_batch_size=None))
        batch, sequences = train.global_batch_size, block // length
        rates = {key: getattr(stage, key) for key in RATES if getattr(stage, key) is not None}
        try:
            positive(global_batch_size=stage.global_batch_size, seq_length=stage.seq_length,
                      lr_wsd_decay_iters=stage.lr_wsd_decay_iters)  # fmt: skip
            check_rates(dataclasses.replace(cfg.schedule, **rates))
            bounded(2**20, global_batch_size=batch)
            bounded(2**24, seq_length=length)
            check_model(model)
            check_batches(own.train, dp)
            check_context(own)
            check_sequence_parallel(own)
            if batch % sequences:
                raise ConfigError(
                    f"global_batch_size ({batch}) must be a multiple of {sequences}, the sequences of {length:,} "
                    f"tokens in a block of {block:,}: {multiples(batch, sequences)}"
                )
        except ConfigError as error:
            is_own = rates or stage.seq_length is not None or stage.global_batch_size is not None
            raise ConfigError(f"stage '{stage.name}': {error}" if is_own else str(error)) from None


def check_training(cfg: Config) -> None:
    """Refuse batches, intervals and optimizer settings that cannot be meant."""
    t, o, s = cfg.train, cfg.optimizer, cfg.schedule
    positive(
        micro_batch_size=t.micro_batch_size, global_batch_size=t.global_batch_size, train_iters=t.train_iters,
        train_samples=t.train_samples, exit_interval=t.exit_interval, eval_iters=t.eval_iters,
        log_interval=cfg.logging.log_interval, peak_tflops=cfg.logging.peak_tflops, adam_eps=o.adam_eps,
        distributed_timeout_minutes=cfg.parallel.distributed_timeout_minutes,
        make_vocab_size_divisible_by=cfg.tokenizer.make_vocab_size_divisible_by, vocab_size=cfg.tokenizer.vocab_size,
        lr_decay_iters=s.lr_decay_iters, lr_wsd_decay_iters=s.lr_wsd_decay_iters,
        muon_num_ns_steps=o.muon_num_ns_steps, muon_scale=o.muon_scale,
    )  # fmt: skip
    bounded(2**20, global_batch_size=t.global_batch_size, micro_batch_size=t.micro_batch_size)
    bounded(2**28, vocab_size=cfg.tokenizer.vocab_size,
             make_vocab_size_divisible_by=cfg.tokenizer.make_vocab_size_divisible_by)  # fmt: skip
    for name, value in (("save_interval", t.save_interval), ("eval_interval", t.eval_interval),
                        ("clip_grad", o.clip_grad), ("weight_decay", o.weight_decay)):  # fmt: skip
        at_least_zero(name, value)
    check_rates(s)
    for name, beta in (("adam_beta1", o.adam_beta1), ("adam_beta2", o.adam_beta2), ("muon_momentum", o.muon_momentum)):
        if not 0 <= beta < 1:
            raise ConfigError(f"{name} ({beta}) must lie in [0, 1)")
    if not 0.01 <= cfg.parallel.distributed_timeout_minutes <= 1e6:
        raise ConfigError(
            f"distributed_timeout_minutes ({cfg.parallel.distributed_timeout_minutes}) must lie in [0.01, 1e6]"
        )
    if not 0 <= t.seed < 2**63:
        raise ConfigError(f"seed ({t.seed}) must lie in [0, 2^63)")
    if not 0 <= t.hidden_dropout < 1:
        raise ConfigError(f"hidden_dropout ({t.hidden_dropout}) must lie in [0, 1)")
    if t.attention_dropout:
        raise ConfigError(
            f"attention_dropout ({t.attention_dropout}) must be 0: attention weights are not dropped; "
            "hidden_dropout drops what attention gives"
        )
    check_checkpoints(cfg.checkpoint, t.save_interval)


def check_replicas(p: ParallelConfig, replicas: int) -> None:
    """Refuse optimizer instances, buckets and hash intervals that the replicas of the model cannot have."""
    positive(num_distributed_optimizer_instances=p.num_distributed_optimizer_instances,
              ddp_bucket_size=p.ddp_bucket_size)  # fmt: skip
    instances = p.num_distributed_optimizer_instances
    if replicas % instances:
        nearest = min((n for n in range(1, replicas + 1) if replicas % n == 0), key=lambda n: abs(n - instances))
        raise ConfigError(
            f"num_distributed_optimizer_instances ({instances}) must divide the {replicas} replicas of the model "
            f"(data-parallel size x context_parallel_size); {nearest} does"
        )
    if p.check_weight_hash_across_dp_replicas_interval < 0:
        raise ConfigError(
            "check_weight_hash_across_dp_replicas_interval "
            f"({p.check_weight_hash_across_dp_replicas_interval}) must be at least 0 (never)"
        )


def check_recompute(t: TrainConfig) -> None:
    """Refuse modules, numbers of blocks and offloading that recomputation does not know."""
    positive(recompute_num_layers=t.recompute_num_layers)
    known = ("core_attn", "layernorm", "mlp_act")
    if not t.recompute_modules or set(t.recompute_modules) - set(known):
        raise ConfigError(f"recompute_modules {t.recompute_modules} must be some of {', '.join(known)}")
    if t.cpu_offloading and t.recompute_granularity != "full":
        raise ConfigError(
            f"cpu_offloading needs recompute_granularity full (it is {t.recompute_granularity}): "
            "what goes to the host are the inputs of redone blocks"
        )


def check_precision(p: PrecisionConfig) -> None:
    """Refuse two types of parameters at once, scales that cannot be, and softmax statistics that no kernel has."""
    if p.fp16 and p.bf16:
        raise ConfigError("fp16 and bf16 are both true: parameters have one type, turn one of them off")
    if not p.attention_softmax_in_fp32:
        raise ConfigError("attention_softmax_in_fp32 (false): the kernels keep softmax statistics in fp32 only")
    positive(loss_scale=p.loss_scale, initial_loss_scale=p.initial_loss_scale, min_loss_scale=p.min_loss_scale,
              loss_scale_window=p.loss_scale_window, hysteresis=p.hysteresis)  # fmt: skip
    if p.min_loss_scale > p.initial_loss_scale:
        raise ConfigError(
            f"min_loss_scale ({p.min_loss_scale}) must not exceed initial_loss_scale ({p.initial_loss_scale})"
        )


def check_compile(cfg: Config) -> None:
    """Refuse torch_compile where a captured block would leave out what an option asks for."""
    if not cfg.train.torch_compile:
        return
    for name, value, lets in (
        ("recompute_granularity", cfg.train.recompute_granularity, (None, "full")),
        ("fp8_recipe", cfg.precision.fp8_recipe, (None,)),
        ("tp_comm_overlap", cfg.parallel.tp_comm_overlap, (False,)),
        ("context_parallel_size", cfg.parallel.context_parallel_size, (1,)),
        ("pipeline_schedule", cfg.parallel.pipeline_schedule, (None, "gpipe", "1f1b", "interleaved")),
    ):
        if value not in lets:
            raise ConfigError(f"torch_compile does not go with {name} {value}: leave out one of them")


def check(cfg: Config, world_size: int) -> int:
    """All checks of this file; returns the data-parallel size. Raises ConfigError with both numbers of a conflict."""
    check_model(cfg.model)
    check_training(cfg)
    check_precision(cfg.precision)
    check_resilience(cfg.resilience)
    check_recompute(cfg.train)
    check_compile(cfg)
    dp = check_layout(cfg, world_size)
    check_replicas(cfg.parallel, dp * cfg.parallel.context_parallel_size)
    check_stages(cfg, dp)
    return dp


def padded_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """Rows of the embedding that training holds: a multiple of divisible_by x tp (Megatron-LM's rule)."""
    multiple = divisible_by * tp
    return (vocab_size + multiple - 1) // multiple * multiple
