"""The sections of the configuration as frozen dataclasses: every option with its default, help line and choices."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import yaml

from megapoly.options import option

DECAY_STYLES = ("cosine", "linear", "constant", "inverse-square-root", "WSD")
WSD_DECAY_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer; the options span the GPT-2, GPT-NeoX and LLaMA block families."""

    num_layers: int = option(4, "transformer blocks")
    hidden_size: int = option(256, "width of the residual stream")
    ffn_hidden_size: int | None = option(None, "inner width of the MLP (default 4 x hidden_size, with swiglu too)")
    num_attention_heads: int = option(8, "query heads")
    num_query_groups: int | None = option(None, "key/value heads (default: as many as query heads)")
    kv_channels: int | None = option(None, "width of a head (default hidden_size / num_attention_heads)")
    seq_length: int = option(128, "tokens in a training sequence")
    max_position_embeddings: int | None = option(None, "longest sequence the model may see (default seq_length)")
    position_embedding_type: str = option(
        "learned_absolute", "how positions enter", ("learned_absolute", "rope", "none")
    )
    rotary_percent: float = option(1.0, "part of each head that is rotated")
    rotary_base: float = option(10000.0, "base of the rotary frequencies")
    normalization: str = option("LayerNorm", "norm of the blocks", ("LayerNorm", "RMSNorm"))
    norm_epsilon: float = option(1e-5, "epsilon inside the norm")
    activation: str = option("gelu_tanh", "activation of the MLP", ("gelu_tanh", "gelu", "swiglu", "geglu"))
    add_bias_linear: bool = option(True, "biases on all linear layers but the head")
    parallel_residual: bool = option(False, "attention and MLP read the same input (GPT-NeoX)")
    untie_embeddings_and_output_weights: bool = option(False, "a head of its own instead of the embedding's matrix")
    init_method: str = option("normal", "distribution of initial weights", ("normal", "xavier_normal"))
    init_method_std: float = option(0.02, "standard deviation for init_method normal")
    scaled_output_init: bool = option(True, "divide the std of residual outputs by sqrt(2 x num_layers)")
    use_mup: bool = option(False, "maximal update parametrization: the width scales init, rates, attention and logits")
    mup_base_hidden_size: int = option(256, "use_mup: the width at which lr and init_method_std were tuned")

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def max_positions(self) -> int:
        return self.max_position_embeddings or self.seq_length

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated: int(head_dim x rotary_percent), as GPT-NeoX counts them."""
        return int(self.head_dim * self.rotary_percent) if self.position_embedding_type == "rope" else 0

    @property
    def width_multiple(self) -> float:
        """muP's m: the width over that at which the hyperparameters were tuned; 1 without muP."""
        return self.hidden_size / self.mup_base_hidden_size if self.use_mup else 1.0

    @property
    def softmax_scale(self) -> float | None:
        """What multiplies attention's scores in muP; None: head_dim^-1/2, as attention does by itself."""
        return 1.0 / self.head_dim if self.use_mup else None

    @property
    def is_gated(self) -> bool:
        return self.activation in ("swiglu", "geglu")

    @property
    def tied(self) -> bool:
        return not self.untie_embeddings_and_output_weights


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer whose ids the data holds."""

    tokenizer_type: str = option(
        "SentencePieceTokenizer", "kind of tokenizer", ("SentencePieceTokenizer", "HuggingFaceTokenizer")
    )
    tokenizer_model: str | None = option(
        None, "its file (.model) or directory / tokenizer.json (default data_root/tokenizer.model)"
    )
    vocab_size: int | None = option(None, "rows of the embedding before padding (default: the tokenizer's size)")
    make_vocab_size_divisible_by: int = option(
        128, "each tensor-parallel shard of the vocabulary is a multiple of this"
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """One stream of text: its files one after the other."""

    name: str
    language: str
    kind: str = "text"
    weight: float = 1.0
    paths: list[str] = field(default_factory=list)
    valid_paths: list[str] = field(default_factory=list)
    fim_rate: float | None = None
    packed: bool | None = None  # by preprocess_data.py --pack-length; false reads a packed set as a stream

    @property
    def is_non_english(self) -> bool:
        return self.language != "en" and self.kind != "code"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens lie."""

    data_root: str = option("data", "where a preset finds {source}_text_document.bin/.idx")
    sources: list[Source] = option([], "the sources (YAML only)")
    block_length: int | None = option(None, "tokens of a sample, fixed for the run (default: the longest sequence)")
    reset_attention_mask: bool = option(False, "tokens do not see those of another document in their sequence")
    reset_position_ids: bool = option(False, "positions begin anew with each document")
    eod_mask_loss: bool = option(False, "what follows the end of a document does not count in the loss")
    fim_rate: float = option(0.0, "part of the documents of code whose middle is moved to their end, to be filled in")
    fim_spm_rate: float = option(0.5, "part of these in which the suffix comes before the prefix")
    fim_prefix_token: str = option("<fim_prefix>", "the token that marks a prefix")
    fim_middle_token: str = option("<fim_middle>", "the token that marks a middle")
    fim_suffix_token: str = option("<fim_suffix>", "the token that marks a suffix")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training: a budget in tokens, and shares given in exactly one of the six ways down to the dial.

    What it gives beyond them holds for the stage; where it gives none of the learning rate, the schedule that runs
    goes on.
    """

    name: str
    tokens: int
    weights: dict[str, float] | None = None  # by source
    language_weights: dict[str, float] | None = None
    alpha: float | None = None  # a language's share goes with its tokens^alpha (XLM-R)
    temperature: float | None = None  # the same by T = 1 / alpha
    unimax: float | None = None  # all languages alike, no source more often than so many epochs
    non_english_share: float | dict[str, Any] | None = None  # or a ramp {from, to, shape, steps}
    code_share: float = 0.0
    lr: float | None = None
    min_lr: float | None = None
    lr_decay_style: str | None = field(default=None, metadata={"choices": DECAY_STYLES})
    lr_warmup_iters: int | None = None
    lr_warmup_init: float | None = None
    lr_wsd_decay_iters: int | None = None
    lr_wsd_decay_style: str | None = field(default=None, metadata={"choices": WSD_DECAY_STYLES})
    global_batch_size: int | None = None
    seq_length: int | None = None
    reset_optimizer: bool = False  # moments and momentum begin anew with the stage


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """The order of stages; the length of a run is the sum of their budgets."""

    stages: list[Stage] = option([], "the stages (YAML only)")
    max_epochs: float | None = option(None, "refuse a plan that reads any source more often than this")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The layout; data parallel takes what is left of the world."""

    tensor_model_parallel_size: int = option(1, "ranks that share each matrix")
    pipeline_model_parallel_size: int = option(1, "ranks that share the layers")
    context_parallel_size: int = option(1, "ranks that share each sequence")
    sequence_parallel: bool = option(False, "shard norms and residuals over the tensor-parallel ranks")
    tp_comm_overlap: bool = option(False, "cut column and row GEMMs into chunks that overlap their collectives")
    pipeline_schedule: str | None = option(
        None, "order of passes (default: 1f1b, with several chunks interleaved)",
        ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"),
    )  # fmt: skip
    num_virtual_stages_per_pipeline_rank: int | None = option(
        None, "model chunks a rank (default 1; interleaved and zb-v: 2)"
    )
    pipeline_layer_split: list[int] | None = option(
        None, "layers of each stage (of all chunks in the order of the model) by hand, e.g. 3,2 (default: by cost)"
    )
    pipeline_vocab_parallel: bool = option(False, "share the head and its loss among all pipeline ranks")
    num_distributed_optimizer_instances: int = option(
        1, "replicas of the optimizer's shards; gradients are summed within one first, then over them"
    )
    overlap_grad_reduce: bool = option(True, "reduce gradients bucket by bucket while the backward pass goes on")
    overlap_param_gather: bool = option(True, "gather updated parameters bucket by bucket while the next step begins")
    ddp_bucket_size: int = option(40_000_000, "parameters in a bucket of the gradient reduction")
    check_weight_hash_across_dp_replicas_interval: int = option(
        0, "steps between comparisons of the parameters' hashes over their replicas; 0: never"
    )
    distributed_backend: str | None = option(None, "nccl or gloo (default: nccl on CUDA)", ("nccl", "gloo"))
    distributed_timeout_minutes: float = option(
        10.0, "a collective that waits longer, or a step without progress for 3/4 of it, ends the job"
    )

    @property
    def chunks(self) -> int:
        """Parts of the model that a pipeline rank holds."""
        folds = self.pipeline_schedule in ("interleaved", "zb-v")
        return self.num_virtual_stages_per_pipeline_rank or (2 if folds else 1)

    @property
    def shares_head(self) -> bool:
        """Whether several pipeline ranks share the head."""
        return self.pipeline_vocab_parallel and self.pipeline_model_parallel_size > 1

    @property
    def schedule(self) -> str:
        """The order of passes."""
        if self.shares_head:
            return "1f1b-vocab"
        return self.pipeline_schedule or ("interleaved" if self.chunks > 1 else "1f1b")

    @property
    def stages(self) -> int:
        """Parts that the model is cut into."""
        return self.pipeline_model_parallel_size * self.chunks


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """What is computed in which type, and by which implementation (`auto`: the fastest measured on this GPU)."""

    bf16: bool | None = option(None, "bf16 parameters with fp32 master weights (default: on CUDA)")
    fp16: bool = option(False, "fp16 parameters with fp32 master weights and loss scaling")
    loss_scale: float | None = option(None, "fp16: a fixed scale of the loss (default: dynamic)")
    initial_loss_scale: float = option(2.0**32, "fp16: first dynamic scale")
    min_loss_scale: float = option(1.0, "fp16: the dynamic scale does not fall below this")
    loss_scale_window: int = option(1000, "fp16: steps without overflow after which the scale doubles")
    hysteresis: int = option(2, "fp16: overflows until the scale is halved")
    fp8_recipe: str | None = option(
        None, "FP8 in the GEMMs of the blocks (Hopper and later); one scale a tensor, taken when it is used",
        ("tensorwise",),
    )  # fmt: skip
    accumulate_allreduce_grads_in_fp32: bool = option(
        True, "sum gradients over replicas in fp32, else in bf16 (over micro-batches always in fp32)"
    )
    attention_softmax_in_fp32: bool = option(True, "softmax statistics in fp32 (no kernel knows another way)")
    fp32_residual_connection: bool = option(False, "keep the residual stream in fp32, over pipeline sends too")
    attention_backend: str = option("auto", "attention with rotary", ("auto", "triton", "sdpa", "flash_attn"))
    norm_backend: str = option("auto", "norm with residual add", ("auto", "triton", "torch", "apex"))
    activation_backend: str = option("auto", "activation of the MLP", ("auto", "triton", "torch"))
    loss_backend: str = option("auto", "fused_linear: no logits are held", ("auto", "fused_linear", "triton", "torch"))
    adamw_backend: str = option("auto", "AdamW and global norms", ("auto", "triton", "torch"))

    @property
    def parameters(self) -> str:
        """Type of the parameters, by torch's name for it."""
        return "float16" if self.fp16 else "bfloat16" if self.bf16 else "float32"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer of the fp32 master weights, sharded over data-parallel ranks."""

    optimizer: str = option(
        "adam", "adam (AdamW), or muon for the blocks' matrices and AdamW for the rest", ("adam", "muon")
    )
    adam_beta1: float = option(0.9, "decay of the first moment")
    adam_beta2: float = option(0.95, "decay of the second moment")
    adam_eps: float = option(1e-8, "epsilon of Adam")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices (never of biases and norms)")
    no_weight_decay_embeddings: bool = option(False, "leave embeddings, and a head tied to one, out of weight decay")
    muon_momentum: float = option(0.95, "Muon: decay of its momentum, taken as Nesterov's")
    muon_num_ns_steps: int = option(5, "Muon: Newton-Schulz iterations")
    muon_scale: float = option(
        0.2, "Muon: root mean square of an update before the learning rate (AdamW's is about 0.2)"
    )
    clip_grad: float = option(1.0, "global gradient norm is clipped to this; 0 turns clipping off")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate as a function of the step."""

    lr: float = option(1e-3, "peak learning rate")
    min_lr: float = option(0.0, "learning rate at the end of the decay")
    lr_warmup_init: float = option(0.0, "learning rate from which warm-up starts")
    lr_warmup_iters: int = option(0, "steps of linear warm-up")
    lr_decay_iters: int | None = option(None, "step at which the decay ends (default: the run's last)")
    lr_decay_style: str = option("cosine", "shape of the decay", DECAY_STYLES)
    lr_wsd_decay_iters: int | None = option(None, "WSD: steps of the final decay (default: a tenth of all)")
    lr_wsd_decay_style: str = option("exponential", "WSD: shape of the final decay", WSD_DECAY_STYLES)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Batches, seed and intervals."""

    micro_batch_size: int = option(1, "sequences in one forward pass of a data-parallel rank")
    global_batch_size: int = option(8, "sequences in one optimizer step over all ranks")
    rampup_batch_size: list[int] | None = option(
        None, "start,increment,samples: grow the global batch from start by increments over so many samples"
    )
    recompute_granularity: str | None = option(
        None, "redo forward passes in backward to save memory: parts of blocks, or whole ones", ("selective", "full")
    )
    recompute_modules: list[str] = option(
        ["core_attn", "layernorm", "mlp_act"], "selective: what is redone: core_attn, layernorm, mlp_act"
    )
    recompute_method: str = option("uniform", "full: all blocks, or the first of each chunk", ("uniform", "block"))
    recompute_num_layers: int = option(1, "full, uniform: blocks redone at once; full, block: blocks that are redone")
    cpu_offloading: bool = option(False, "full: keep the inputs of redone blocks in host memory (no gain on a CPU)")
    torch_compile: bool = option(
        False, "compile each block with torch.compile; gradients of its matrices then come by autograd, not overlapped"
    )
    seed: int = option(1234, "seed of weights, data order and dropout")
    hidden_dropout: float = option(0.0, "share of the embedding's and of each branch's entries that is dropped")
    attention_dropout: float = option(0.0, "must be 0: attention weights are not dropped")
    train_iters: int | None = option(None, "stop after so many steps (may only shorten the stages' budgets)")
    train_samples: int | None = option(None, "stop after so many samples (may only shorten the budgets)")
    save_interval: int = option(0, "steps between checkpoints; 0: only at the end")
    eval_interval: int = option(0, "steps between evaluations of held-out text; 0: only at the end")
    eval_iters: int | None = option(None, "global batches of an evaluation at most (default: all held-out text)")
    exit_interval: int | None = option(None, "stop, with a checkpoint, at the first step divisible by this")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where state is written to and read from."""

    save: str | None = option(None, "directory of checkpoints (default RUN/checkpoints)")
    load: str | None = option(None, "start from this checkpoint, run or step folder")
    finetune: bool = option(False, "with load: take the weights only and start at step 0")
    async_save: bool = option(
        True, "a step waits only until its state is copied to host memory, not until it is written"
    )
    save_copy: str | None = option(None, "a second directory that every checkpoint is written to as well")
    most_recent_k: int | None = option(None, "keep so many of the newest checkpoints (default: all)")
    save_retain_interval: int | None = option(None, "keep those of every so many steps for ever, and the newest of all")
    save_steps: list[int] = option([], "further steps to save at; their checkpoints are kept for ever")
    max_failed_saves: int = option(3, "saves that may fail in a row until the run ends")
    max_save_minutes: float = option(30.0, "end the run, for a restart, where it waits for a save so long; 0: never")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Records of a run."""

    run_dir: str = option("runs/default", "where config.yaml, metrics.jsonl, tensorboard/ and checkpoints/ are written")
    log_interval: int | None = option(None, "steps between printed lines (default 1 on CPU, 10 on CUDA)")
    tensorboard: bool = option(True, "write TensorBoard event files")
    peak_tflops: float | None = option(None, "peak of one device in TFLOP/s for MFU (default by GPU name)")


@dataclass(frozen=True, kw_only=True)
class ResilienceConfig:
    """What a run does about numerical trouble."""

    max_skipped_steps: int = option(10, "end the run after so many steps in a row without an update; 0: never")
    spike_policy: str = option(
        "warn", "on a spike: say so; do not take the update (gradient norm); go back and leave out the data around it",
        ("off", "warn", "skip", "rollback"),
    )  # fmt: skip
    spike_window: int = option(128, "steps whose median and median absolute deviation say what is usual")
    spike_threshold: float = option(10.0, "a spike is so many (robust) standard deviations above the median")
    rollback_steps: int = option(100, "rollback: go back at least so many steps before the spike, where that is saved")
    rollback_batches: int = option(200, "rollback: batches around the spike that are left out")
    max_rollbacks: int = option(3, "rollback: end the run at the spike after so many")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
