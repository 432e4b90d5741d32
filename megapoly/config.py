"""The configuration: YAML sections read into frozen dataclasses, presets, and every check that needs no process group.

Precedence: flags, then the YAML file, then its `preset:`, then `tiny`. A leaf name is unique over all sections, so that
each is also a flag (`megapoly.cli`).
"""

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from megapoly.errors import ConfigError
from megapoly.yaml12 import parse_yaml


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A configuration leaf with its default, its help line and, where it has them, its choices."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer; the options span the GPT-2, GPT-NeoX and LLaMA block families."""

    num_layers: int = option(4, "transformer blocks")
    hidden_size: int = option(256, "width of the residual stream")
    ffn_hidden_size: int | None = option(None, "inner width of the MLP (default 4 x hidden_size)")
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

    @property
    def is_non_english(self) -> bool:
        return self.language != "en" and self.kind != "code"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens lie."""

    data_root: str = option("data", "where a preset finds {source}_text_document.bin/.idx")
    sources: list[Source] = option([], "the sources (YAML only)")
    block_length: int | None = option(None, "tokens in a slice of a source, fixed for the run (default seq_length)")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training with a token budget and fixed shares; exactly one of `weights` and `non_english_share`."""

    name: str
    tokens: int
    weights: dict[str, float] | None = None
    non_english_share: float | None = None
    code_share: float = 0.0


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
    sequence_parallel: bool = option(False, "shard norms and residuals over the tensor-parallel ranks")
    pipeline_layer_split: list[int] | None = option(None, "layers of each stage by hand, e.g. 3,2 (default: by cost)")
    distributed_backend: str | None = option(None, "nccl or gloo (default: nccl on CUDA)", ("nccl", "gloo"))
    distributed_timeout_minutes: float = option(10.0, "a collective that waits longer ends the job")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """What is computed in which type, and by which implementation (`auto`: the fastest measured on this GPU)."""

    bf16: bool | None = option(None, "bf16 parameters with fp32 master weights (default: on CUDA)")
    fp32_residual_connection: bool = option(False, "keep the residual stream in fp32, over pipeline sends too")
    attention_backend: str = option("auto", "attention with rotary", ("auto", "triton", "sdpa", "flash_attn"))
    norm_backend: str = option("auto", "norm with residual add", ("auto", "triton", "torch", "apex"))
    activation_backend: str = option("auto", "activation of the MLP", ("auto", "triton", "torch"))
    loss_backend: str = option("auto", "fused_linear: no logits are held", ("auto", "fused_linear", "triton", "torch"))
    adamw_backend: str = option("auto", "AdamW and global norms", ("auto", "triton", "torch"))


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW over fp32 master weights, sharded over data-parallel ranks."""

    adam_beta1: float = option(0.9, "decay of the first moment")
    adam_beta2: float = option(0.95, "decay of the second moment")
    adam_eps: float = option(1e-8, "epsilon of Adam")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices (never of biases and norms)")
    clip_grad: float = option(1.0, "global gradient norm is clipped to this; 0 turns clipping off")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate as a function of the step."""

    lr: float = option(1e-3, "peak learning rate")
    min_lr: float = option(0.0, "learning rate at the end of the decay")
    lr_warmup_init: float = option(0.0, "learning rate from which warm-up starts")
    lr_warmup_iters: int = option(0, "steps of linear warm-up")
    lr_decay_iters: int | None = option(None, "step at which the decay ends (default: the run's last)")
    lr_decay_style: str = option("cosine", "shape of the decay", ("cosine", "linear", "constant"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Batches, seed and intervals."""

    micro_batch_size: int = option(1, "sequences in one forward pass of a data-parallel rank")
    global_batch_size: int = option(8, "sequences in one optimizer step over all ranks")
    seed: int = option(1234, "seed of weights and data order")
    train_iters: int | None = option(None, "stop after so many steps (may only shorten the stages' budgets)")
    train_samples: int | None = option(None, "stop after so many sequences (may only shorten the budgets)")
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


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Records of a run."""

    run_dir: str = option("runs/default", "where config.yaml, metrics.jsonl, tensorboard/ and checkpoints/ are written")
    log_interval: int | None = option(None, "steps between printed lines (default 1 on CPU, 10 on CUDA)")
    tensorboard: bool = option(True, "write TensorBoard event files")
    peak_tflops: float | None = option(None, "peak of one device in TFLOP/s for MFU (default by GPU name)")


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

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


SECTIONS: dict[str, type] = {f.name: typing.get_type_hints(Config)[f.name] for f in dataclasses.fields(Config)}
LEAVES: dict[str, str] = {leaf.name: section for section, cls in SECTIONS.items() for leaf in dataclasses.fields(cls)}
YAML_ONLY = ("sources", "stages")


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    names = (entry.name for entry in resources.files("megapoly").joinpath("presets").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the closest known word, or the whole list where none is close."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(known))}"


def _read_layer(name_or_path: str) -> tuple[dict[str, Any], str]:
    names = preset_names()
    if name_or_path in names:
        origin = f"preset {name_or_path}"
        text = resources.files("megapoly").joinpath(f"presets/{name_or_path}.yaml").read_text(encoding="utf-8")
    elif Path(name_or_path).is_file():
        origin = name_or_path
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name_or_path}: cannot be read: {error}") from None
    else:
        raise ConfigError(f"config '{name_or_path}' is neither a file nor a preset; {nearest(name_or_path, names)}")
    tree = parse_yaml(text, origin)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: the top level must be sections ({', '.join(SECTIONS)})")
    return tree, origin


def load_layers(name_or_path: str) -> list[tuple[dict[str, Any], str]]:
    """The chain of a config and its presets, lowest precedence first; each with the name of its origin."""
    layers: list[tuple[dict[str, Any], str]] = []
    seen: list[str] = []
    following: str | None = name_or_path
    while following is not None:
        if following in seen:
            raise ConfigError(f"{following}: presets refer to each other in a circle ({' -> '.join(seen)})")
        seen.append(following)
        tree, origin = _read_layer(following)
        parent = tree.pop("preset", None)
        if parent is not None and parent not in preset_names():
            raise ConfigError(f"{origin}: preset '{parent}' is unknown; {nearest(str(parent), preset_names())}")
        layers.insert(0, (tree, origin))
        following = parent if parent is not None else (None if following == "tiny" else "tiny")
    return layers


# ---------------------------------------------------------------------------------------- from plain data to types


def coerce(value: Any, hint: Any, where: str) -> Any:
    """Check and convert one plain value to the type of its field; integral floats serve as integers."""
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in hint.__args__:
            return None
        hint = next(arg for arg in hint.__args__ if arg is not type(None))
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1:
        return int(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    if typing.get_origin(hint) is list and isinstance(value, list):
        (inner,) = typing.get_args(hint)
        return [coerce(item, inner, f"{where}[{i}]") for i, item in enumerate(value)]
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        _, inner = typing.get_args(hint)
        return {key: coerce(item, inner, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return build(typing.cast(type, hint), value, where)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    kind = "a list" if typing.get_origin(hint) is list else names.get(hint, "a mapping of keys")
    raise ConfigError(f"{where} must be {kind}, not {repr(value)[:80]}")


def build(cls: type, tree: dict[str, Any], where: str) -> Any:
    """Make a dataclass of plain data; unknown and missing keys are refused by name."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in tree.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'; {nearest(str(key), list(known))}")
        at = where + key.replace("_", "-") if where == "flag --" else f"{where}.{key}"
        values[key] = coerce(value, hints[key], at)
        choices = known[key].metadata.get("choices")
        if choices and values[key] is not None and values[key] not in choices:
            raise ConfigError(f"{at} must be one of {', '.join(choices)}, not '{values[key]}'")
    for name, f in known.items():
        missing = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if missing and name not in values:
            raise ConfigError(f"{where}: key '{name}' is missing")
    return cls(**values)


def load_config(name_or_path: str, flags: dict[str, Any] | None = None) -> Config:
    """Resolve a preset name or YAML file plus flags (leaf name -> plain value) into a Config.

    Raises ConfigError for unknown keys (with the nearest known one), wrong types and values that contradict each other.
    """
    merged: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for tree, origin in load_layers(name_or_path):
        for section, entries in tree.items():
            if section not in SECTIONS:
                at = f" (it belongs into section '{LEAVES[section]}')" if section in LEAVES else ""
                hint = at or "; " + nearest(str(section), [*SECTIONS, "preset"])
                raise ConfigError(f"{origin}: unknown section '{section}'{hint}")
            if entries is None:
                continue
            if not isinstance(entries, dict):
                raise ConfigError(f"{origin}: section '{section}' must hold keys, not {entries!r}")
            build(SECTIONS[section], entries, f"{origin}: {section}")  # errors name the layer that is wrong
            merged[section].update(entries)
    for leaf, value in (flags or {}).items():
        if leaf not in LEAVES or leaf in YAML_ONLY:
            raise ConfigError(f"unknown flag --{leaf.replace('_', '-')}; {nearest(leaf, list(LEAVES))}")
        build(SECTIONS[LEAVES[leaf]], {leaf: value}, "flag --")
        merged[LEAVES[leaf]][leaf] = value
    cfg = Config(**{section: build(cls, merged[section], section) for section, cls in SECTIONS.items()})
    return with_source_paths(cfg)


def with_source_paths(cfg: Config) -> Config:
    """Give each source without paths its file under data_root, and the tokenizer likewise."""
    root = Path(cfg.data.data_root)
    sources = []
    for s in cfg.data.sources:
        valid = str(root / f"{s.name}_valid_text_document")
        held_out = s.valid_paths or ([valid] if not s.paths and Path(f"{valid}.idx").is_file() else [])
        paths = s.paths or [str(root / f"{s.name}_text_document")]
        sources.append(dataclasses.replace(s, paths=paths, valid_paths=held_out))
    tokenizer = dataclasses.replace(
        cfg.tokenizer, tokenizer_model=cfg.tokenizer.tokenizer_model or str(root / "tokenizer.model")
    )
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, sources=sources), tokenizer=tokenizer)
