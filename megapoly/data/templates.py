"""Templates that join the fields of a line into a text: a pair of sentences, once in each direction."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megapoly.errors import ConfigError

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True)
class Template:
    """`name` is that of the output; `parts` are (text, field that follows it or None)."""

    name: str
    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, given: str) -> "Template":
        r"""From `NAME=TEXT`, in which `{field}` stands for a field's text and `\n`, `\t`, `\\`, `{{`, `}}` for signs.

        Raises ConfigError.
        """
        name, equals, text = given.partition("=")
        if not equals or not name:
            raise ConfigError(f"template '{given}' must be NAME=TEXT, such as 'en-ko={{en}}\\n{{ko}}'")
        try:
            parsed = list(string.Formatter().parse(_unescaped(text)))
        except ValueError as error:
            raise ConfigError(f"template '{given}': {error}; write {{{{ and }}}} for braces") from None
        for _, field, form, conversion in parsed:
            if field is not None and (not field or form or conversion or set(field) & set(".[]")):
                raise ConfigError(f"template '{given}': a field is written {{name}}, nothing else stands in its braces")
        if not any(field for _, field, *_ in parsed):
            raise ConfigError(f"template '{given}' has no field; write {{name}} where a field's text belongs")
        return cls(name, tuple((before, field) for before, field, *_ in parsed))

    @property
    def fields(self) -> list[str]:
        """Each field once, in the order of the text."""
        return list(dict.fromkeys(field for _, field in self.parts if field is not None))

    def render(self, values: Mapping[str, str]) -> str:
        """The text with the fields filled in; none where one of them is blank, which is no pair."""
        if any(not values[field].strip() for field in self.fields):
            return ""
        return "".join(before + (values[field] if field is not None else "") for before, field in self.parts)


def fields_of(templates: Sequence[Template]) -> tuple[str, ...]:
    """Each field of some templates once."""
    return tuple(dict.fromkeys(field for template in templates for field in template.fields))


def _unescaped(text: str) -> str:
    result, escaped = [], False
    for sign in text:
        if escaped:
            result.append(_ESCAPES.get(sign, "\\" + sign))
        elif sign != "\\":
            result.append(sign)
        escaped = sign == "\\" and not escaped
    return "".join(result) + ("\\" if escaped else "")
