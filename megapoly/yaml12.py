"""YAML with the scalars of YAML 1.2: `no` is a string and `638e9` a number; plain data alone, keys once."""

import itertools
import math
import re
from typing import Any

import yaml

from megapoly.errors import ConfigError

MOST_CHARACTERS = 10**7  # with aliases written out; 300 stages of 100 sources each have less than a tenth


class _Yaml12Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""


_Yaml12Loader.yaml_implicit_resolvers = {
    char: [(tag, rule) for tag, rule in rules if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")]
    for char, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > 40:  # Python does not print one of some thousand digits, as an error would
        raise ValueError(f"a number of {len(text)} digits")
    base = 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10
    return int(text, base)


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a string", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Yaml12Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Yaml12Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """About how many characters a node has with its aliases written out; infinite where it stands in itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted
        if isinstance(node, yaml.ScalarNode):
            size: float = len(node.value)
        else:
            parts = itertools.chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
            size = sum(_written_out(part, known) for part in parts)
        known[id(node)] = size + 2
    return known[id(node)]


def parse_yaml(text: str, origin: str) -> Any:
    """Read YAML with YAML 1.2 scalars; `origin` names the file in errors."""
    try:
        # A SafeLoader: no tag can construct anything but plain data.
        loader = _Yaml12Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > MOST_CHARACTERS:
            raise ValueError(f"with its aliases written out it has more than {MOST_CHARACTERS:,} characters; use fewer")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}, line {mark.line + 1}" if mark else origin
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{where}: not valid YAML: {problem[:200]}") from None
