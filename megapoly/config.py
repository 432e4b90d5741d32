"""The configuration: YAML sections read into the frozen dataclasses of `sections`, presets and flags over them.

Precedence: flags, then the YAML file, then its `preset:`, then `tiny`. A leaf name is unique over all sections, so that
each is also a flag (`megapoly.cli`).
"""

import dataclasses
import difflib
import os
import re
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any

from megapoly.errors import ConfigError
from megapoly.sections import Config
from megapoly.yaml12 import parse_yaml

SECTIONS: dict[str, type] = {f.name: typing.get_type_hints(Config)[f.name] for f in dataclasses.fields(Config)}
LEAVES: dict[str, str] = {leaf.name: section for section, cls in SECTIONS.items() for leaf in dataclasses.fields(cls)}
YAML_ONLY = ("sources", "stages")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # the last ones: halves of characters, or bytes of a flag


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    names = (entry.name for entry in resources.files("megapoly").joinpath("presets").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def nearest(word: str, known: list[str]) -> str:
    """`did you mean 'x'?` for the closest known word or those that it is a part of; the whole list where none is."""
    close = [name for name in known if word in name.split("_")] or difflib.get_close_matches(word, known, 1, 0.6)
    asked = " or ".join(f"'{name}'" for name in close)
    return f"did you mean {asked}?" if 0 < len(close) < 4 else f"known: {', '.join(sorted(known))}"


def _read_layer(name_or_path: str) -> tuple[dict[str, Any], str]:
    names = preset_names()
    if name_or_path in names:
        origin = f"preset {name_or_path}"
        text = resources.files("megapoly").joinpath(f"presets/{name_or_path}.yaml").read_text(encoding="utf-8")
    elif os.path.isfile(name_or_path):  # Path's refuses long names with an OSError
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
    takes_mapping = False
    if isinstance(hint, types.UnionType):
        takes_mapping = any(typing.get_origin(arg) is dict for arg in hint.__args__)
        if value is None and type(None) in hint.__args__:
            return None
        members = [arg for arg in hint.__args__ if arg is not type(None)]
        if isinstance(value, dict):  # where a value or a mapping will do
            members.sort(key=lambda arg: typing.get_origin(arg) is not dict)
        hint = members[0]
    if hint is Any:
        return value
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1:
        return int(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    if hint is str and isinstance(value, str):
        if not value.strip():
            raise ConfigError(f"{where} must not be empty; leave it out")
        if _UNPRINTABLE.search(value):
            raise ConfigError(
                f"{where} is no text: {ascii(value)[:80]} (control characters, or bytes that are not UTF-8)"
            )
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
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    kind += " within 1e300" if hint is float and is_number else ""
    kind += " or a mapping of keys" * (hint is float and takes_mapping)
    raise ConfigError(f"{where} must be {kind}, not {repr(value)[:80]}{_as_number(value) * (hint in (int, float))}")


def _as_number(value: Any) -> str:
    """How a number with a unit, as people write it, is written in YAML."""
    number = r"([0-9]{1,15}(?:\.[0-9]{1,15})?)"
    match = re.fullmatch(f"{number} ?([%KMBT])", value) if isinstance(value, str) else None
    if match is None:
        return ""
    powers = {"K": "e3", "M": "e6", "B": "e9", "T": "e12"}
    return f"; write {match[1]}{powers[match[2]]}" if match[2] in powers else f"; write {float(match[1]) / 100:.12g}"


def build(cls: type, tree: dict[str, Any], where: str) -> Any:
    """Make a dataclass of plain data; unknown and missing keys are refused by name."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in tree.items():
        if key not in known:
            shown = str(key)[:60]
            at = f"it belongs into section '{LEAVES[key]}'" if key in LEAVES else nearest(shown, list(known))
            raise ConfigError(f"{where}: unknown key '{shown}'; {at}")
        at = where + key.replace("_", "-") if where == "flag --" else f"{where}.{key}"
        values[key] = coerce(value, hints[key], at)
        choices = known[key].metadata.get("choices")
        if choices and values[key] is not None and values[key] not in choices:
            raise ConfigError(f"{at} must be one of {', '.join(choices)}, not '{str(values[key])[:60]}'")
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
                raise ConfigError(f"{origin}: section '{section}' must hold keys, not {repr(entries)[:80]}")
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
        held_out = s.valid_paths or ([valid] if not s.paths and os.path.isfile(f"{valid}.idx") else [])
        paths = s.paths or [str(root / f"{s.name}_text_document")]
        sources.append(dataclasses.replace(s, paths=paths, valid_paths=held_out))
    tokenizer = dataclasses.replace(
        cfg.tokenizer, tokenizer_model=cfg.tokenizer.tokenizer_model or str(root / "tokenizer.model")
    )
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, sources=sources), tokenizer=tokenizer)
