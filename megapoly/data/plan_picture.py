"""A picture of the plan: the languages' shares as served, stacked, over the run's tokens; here on a terminal."""

import itertools
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from megapoly.data.curriculum import Number, Plan
from megapoly.data.sources import CODE, language_of

SAMPLES_OF_WINDOW = 64  # fewer would show how samples alternate, not their shares
COLUMNS, ROWS = 88, 20
RESET = "\x1b[0m"
# Neighbours in the stack differ in hue, and the two rounds in lightness.
COLOURS = (
    "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#edc948", "#76b7b2", "#9c755f", "#ff9da7", "#2f4b7c",
    "#a0cbe8", "#d4660d", "#8cd17d", "#a3123a", "#d4a6c8", "#8f7a14", "#1d7874", "#d7b5a6", "#d1446b", "#6a5acd",
)  # fmt: skip
GREY = "#9a9a9a"


@dataclass(frozen=True)
class Window:
    """Samples begin to end, all of one stage, and what the sampler serves of each language in them."""

    begin: int
    end: int
    stage: int
    shares: dict[str, float]


def windows(plan: Plan, most: int) -> list[Window]:
    """About `most` windows at most, of equal length within a stage, every stage at least one."""
    found, languages = [], [language_of(source) for source in plan.sources]
    most = max(min(most, plan.num_samples // SAMPLES_OF_WINDOW), 1)
    before = [0] * len(languages)
    for number, stage in enumerate(plan.stages):
        parts = min(max(round(most * stage.samples / plan.num_samples), 1), stage.samples)
        borders = [stage.begin_sample + stage.samples * i // parts for i in range(parts + 1)]
        for begin, end in itertools.pairwise(borders):
            after = plan.sampler().counts(end)
            shares = dict.fromkeys(languages, 0.0)
            counts = [now - then for now, then in zip(after, before, strict=True)]
            for language, share in zip(languages, plan.text_shares(counts), strict=True):
                shares[language] += float(share)
            found.append(Window(begin, end, number, shares))
            before = after
    return found


def stack_order(plan: Plan) -> list[str]:
    """Languages that are read, from the bottom up: English, the others by their tokens, code."""
    languages = [language_of(source) for source in plan.sources]
    tokens: dict[str, Number] = dict.fromkeys(languages, 0)
    for language, amount in zip(languages, plan.text(plan.sampler().counts(plan.num_samples)), strict=True):
        tokens[language] += amount
    rank = {"en": -1, CODE: 1}
    return sorted((x for x in tokens if tokens[x]), key=lambda x: (rank.get(x, 0), -tokens[x]))


def short(tokens: float) -> str:
    """A number of tokens with a unit: 638B, 97.5M, 128."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.4g}{unit}"
    return f"{tokens:.4g}"


def colour_of(order: Sequence[str]) -> dict[str, str]:
    """A colour for each language; code is grey. Beyond twenty they repeat."""
    others = [language for language in order if language != CODE]
    return {CODE: GREY} | {language: COLOURS[i % len(COLOURS)] for i, language in enumerate(others)}


# ------------------------------------------------------------------------------------------------------ terminal


def symbols(languages: Sequence[str]) -> dict[str, str]:
    """One character for each language: a letter of its code where one is free, else any that is."""
    taken: dict[str, str] = {}
    anything = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for language in languages:
        wanted = [*(["#"] if language == CODE else []), *language, *language.upper(), *anything]
        taken[language] = next((c for c in wanted if c not in taken.values()), "?")
    return taken


def draw_text(plan: Plan, colours: bool = False, columns: int = COLUMNS, rows: int = ROWS) -> str:
    """Rows of characters, one for each language; those that never fill a row of their own stand as dots.

    With `colours` the cells have the PNG's colours, by the terminal's escape codes.
    """
    seen = windows(plan, columns)
    order = stack_order(plan)
    thin = [x for x in order if max(window.shares[x] for window in seen) < 1 / rows and x != "en"]
    wide = [x for x in order if x not in thin]
    letter, colour = symbols(wide), colour_of(order)
    # What is too thin for a row goes to the top, together.
    stacks = [[(x, w.shares[x]) for x in wide] + [("", sum(w.shares[x] for x in thin))] for w in seen]
    per_stage = [sum(w.stage == i for w in seen) for i in range(len(plan.stages))]
    width = max(columns // len(seen), 1)
    lines = []
    for row in reversed(range(rows)):
        cells = []
        for i, (window, stack) in enumerate(zip(seen, stacks, strict=True)):
            border = "|" if i and window.stage != seen[i - 1].stage else ""
            language = _at(stack, (row + 0.47) / rows)  # round shares lie on no border
            cell = (letter[language] if language else ".") * width
            cells.append(border + (_painted(cell, colour.get(language, GREY)) if colours else cell))
        label = f"{100 * (row + 1) / rows:.0f}%" if (row + 1) % 5 == 0 else ""
        lines.append(f"{label:>5} |{''.join(cells)}|")
    axis = "+".join("-" * (n * width) for n in per_stage)
    lines += [f"{'0%':>5} +{axis}+", *_axis_labels(plan, [n * width for n in per_stage])]
    key = [f"{letter[x]} {x}" for x in wide]
    key += [f". {len(thin)} under {1 / rows:.0%} each: {' '.join(thin)}"] if thin else []
    return "\n".join([*lines, *_wrapped("   ".join(key))])


def _at(stack: list[tuple[str, float]], height: float) -> str:
    for language, share in stack:
        height -= share
        if height < 0:
            return language
    return stack[-1][0]


def _painted(cell: str, colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    ink = 30 if red * 3 + green * 6 + blue > 1250 else 97
    return f"\x1b[48;2;{red};{green};{blue};{ink}m{cell}{RESET}"


def _axis_labels(plan: Plan, widths: list[int]) -> list[str]:
    """Each stage's name and tokens under its columns; where one does not fit, numbers and what they stand for."""
    names = [stage.name for stage in plan.stages]
    tokens = [short(stage.samples * plan.block_length) for stage in plan.stages]
    indent = " " * 7
    if all(max(len(name), len(n)) <= width for name, n, width in zip(names, tokens, widths, strict=True)):
        lines = [
            "".join(f"{text:<{width + 1}}" for text, width in zip(of, widths, strict=True)) for of in (names, tokens)
        ]
        return [(indent + line).rstrip() for line in lines]
    numbers = "".join(f"{i:<{width + 1}}" for i, width in enumerate(widths, start=1))
    key = ", ".join(f"{i} {name} {n}" for i, (name, n) in enumerate(zip(names, tokens, strict=True), start=1))
    return [(indent + numbers).rstrip(), *_wrapped(key)]


def _wrapped(text: str) -> list[str]:
    indent = " " * 7
    return textwrap.wrap(text, COLUMNS + 8, initial_indent=indent, subsequent_indent=indent)
