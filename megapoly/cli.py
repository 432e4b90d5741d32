"""Flags: every leaf of the configuration is one, in Megatron-LM's spelling where Megatron has it."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from megapoly.config import LEAVES, SECTIONS, YAML_ONLY, nearest
from megapoly.errors import ConfigError
from megapoly.sections import Config
from megapoly.yaml12 import parse_yaml

# Megatron-LM's switches that set a leaf of another name.
ALIASES: dict[str, tuple[str, Any]] = {
    "swiglu": ("activation", "swiglu"),
    "disable_bias_linear": ("add_bias_linear", False),
    "use_rotary_position_embeddings": ("position_embedding_type", "rope"),
}


def _hint(leaf: str) -> Any:
    return typing.get_type_hints(SECTIONS[LEAVES[leaf]])[leaf]


def _is(hint: Any, kind: type) -> bool:
    members = typing.get_args(hint) if typing.get_origin(hint) is not list else (hint,)
    return hint is kind or kind in members or any(typing.get_origin(m) is kind for m in members)


def _value(leaf: str, text: str) -> Any:
    """The plain value of a flag's text: strings stay as they are, the rest is read as a YAML 1.2 scalar."""
    hint, flag = _hint(leaf), f"flag --{leaf.replace('_', '-')}"
    parts = text.split(",") if _is(hint, list) else [text]
    if not all(part.strip() for part in parts):
        raise ConfigError(f"{flag} needs a value" + (f", not '{text}': one is empty" if len(parts) > 1 else ""))
    if _is(hint, str):
        return text
    return [parse_yaml(part, flag) for part in parts] if _is(hint, list) else parse_yaml(text, flag)


def _taken(words: list[str], is_list: bool) -> list[str]:
    """Take a flag's value off the words; a list may stand in several, as Megatron-LM's flags have it."""
    taken = [words.pop(0)]
    while is_list and words and not words[0].startswith("--"):
        taken.append(words.pop(0))
    return taken


def parse_flags(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Split a command line into configuration flags (leaf name -> plain value) and the remaining words.

    `--name value`, `--name=value`; a boolean stands alone, as `--no-name` or with `true`/`false`. The last one wins.
    Raises ConfigError where a value is missing.
    """
    flags: dict[str, Any] = {}
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        leaf = name.replace("-", "_")
        if not word.startswith("--") or not leaf:
            rest.append(word)
        elif leaf in ALIASES:
            flags[ALIASES[leaf][0]] = ALIASES[leaf][1]
        elif leaf in LEAVES and leaf not in YAML_ONLY:
            if has_value:
                flags[leaf] = _value(leaf, value)
            elif _is(_hint(leaf), bool):
                is_word = bool(words) and words[0] in ("true", "false")
                flags[leaf] = (words.pop(0) == "true") if is_word else True
            elif not words or words[0].startswith("--"):
                raise ConfigError(f"flag {word} needs a value")
            else:
                flags[leaf] = _value(leaf, ",".join(_taken(words, is_list=_is(_hint(leaf), list))))
        elif leaf.startswith("no_") and leaf[3:] in LEAVES and _is(_hint(leaf[3:]), bool):
            flags[leaf[3:]] = False
        else:
            rest.append(word)
    return flags, rest


def refuse_unknown(rest: Sequence[str], known: Sequence[str] = ()) -> None:
    """Raise ConfigError for the first word that is no flag, with the nearest flag there is."""
    for word in rest:
        name = word.removeprefix("--").partition("=")[0].replace("-", "_")
        if name in YAML_ONLY:
            raise ConfigError(f"{word} is set in a YAML file, not by a flag")
        if word.startswith("--"):
            hint = nearest(name, [*LEAVES, *ALIASES, *known]).replace("_", "-")
            raise ConfigError(f"unknown flag {word}; {hint if hint.startswith('did') else 'see --help'}")
        raise ConfigError(f"unexpected word '{word}' on the command line; see --help")


def help_text(usage: str) -> str:
    """All flags by section with their meaning and default."""
    lines = [usage, ""]
    defaults = Config()
    for section, cls in SECTIONS.items():
        lines.append(f"{section}:")
        for leaf in dataclasses.fields(cls):
            if leaf.name in YAML_ONLY:
                continue
            choices = leaf.metadata.get("choices")
            about = f" ({' | '.join(choices)})" if choices else ""
            default = getattr(getattr(defaults, section), leaf.name)
            shown = "" if default is None else f" [{default}]"
            lines.append(f"  --{leaf.name.replace('_', '-'):<38} {leaf.metadata['help']}{about}{shown}")
    return "\n".join(lines)
