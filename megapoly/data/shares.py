"""The shares of a stage over its sources, exact fractions, from any of the six ways in which a stage may give them.

A share is of text. A sample of packed documents is not full of it, so such a source has more of the samples than of the
text: its share over its fullness.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from functools import cached_property

from megapoly.config import nearest
from megapoly.data.ramp import Ramp
from megapoly.data.sources import CODE, ENGLISH, NON_ENGLISH, PlanSource, decimal, language_of, part_of
from megapoly.errors import ConfigError, DataError
from megapoly.sections import Source, Stage

Shares = tuple[Fraction, ...]
WAYS = ("weights", "language_weights", "alpha", "temperature", "unimax", "non_english_share")
POWER_DIGITS = 40  # of tokens^alpha, in software: every host has the same digits
POWER_UNIT = 10**12
ROUNDING = 2  # samples by which the sampler may pass a quota


@dataclass(frozen=True)
class ShareStep:
    """A stretch of `samples` samples with constant shares."""

    samples: int
    shares: Shares


@dataclass(frozen=True)
class Mixture:
    """What a stage mixes: the sources as configured and as counted, with what earlier stages take of each (samples)."""

    stage: Stage
    sources: Sequence[Source]
    counted: Sequence[PlanSource]
    block_length: int
    samples: int
    taken: Sequence[Fraction]

    @property
    def name(self) -> str:
        return self.stage.name

    @cached_property
    def fullness(self) -> list[Fraction]:
        """Part of each source's samples that is text."""
        return [source.fullness(self.block_length) for source in self.counted]

    @cached_property
    def weights(self) -> list[Fraction]:
        return [decimal(source.weight, f"source '{source.name}': weight") for source in self.sources]

    @property
    def languages(self) -> list[str]:
        """Languages of the text, each once, in the order of the sources."""
        return list(dict.fromkeys(s.language for s in self.sources if s.kind != "code"))

    @cached_property
    def members(self) -> list[list[int]]:
        """The numbers of each language's sources."""
        return [
            [i for i, s in enumerate(self.sources) if s.kind != "code" and s.language == code]
            for code in self.languages
        ]

    @property
    def code(self) -> Fraction:
        """The share of code."""
        return decimal(self.stage.code_share, f"stage '{self.name}': code_share", most=1)


def share_steps(mix: Mixture) -> tuple[ShareStep, ...]:
    """The stage as stretches of constant shares of samples; one, unless its share is a ramp.

    ConfigError for shares that contradict themselves, DataError for a source that has a share and no slice.
    """
    way = _way(mix.stage)
    dial = mix.stage.non_english_share
    if isinstance(dial, dict):
        where = f"stage '{mix.name}': non_english_share"
        stairs = Ramp.of(dial, where).staircase(mix.samples)
        steps = tuple(ShareStep(samples, _of_samples(mix, _by_dial(mix, share))) for samples, share in stairs)
    else:
        steps = (ShareStep(mix.samples, _of_samples(mix, WAY[way](mix))),)
    return steps


def _of_samples(mix: Mixture, shares: Shares) -> Shares:
    """Shares of text as shares of samples; DataError for a source that has one and no slice."""
    _refuse_unreadable(mix, shares)
    if not any(source.packed for source in mix.counted):
        return shares
    samples = [share / part for share, part in zip(shares, mix.fullness, strict=True)]
    return tuple(share / sum(samples) for share in samples)


def _way(stage: Stage) -> str:
    given = [way for way in WAYS if getattr(stage, way) is not None]
    if not given:
        raise ConfigError(f"stage '{stage.name}' gives no shares; give one of {', '.join(WAYS)}")
    if len(given) > 1:
        raise ConfigError(f"stage '{stage.name}' gives {' and '.join(given)}: one of them decides, remove the others")
    if given[0] == "weights" and stage.code_share:
        raise ConfigError(f"stage '{stage.name}' gives weights and code_share: weights alone decide, remove one")
    return given[0]


# ------------------------------------------------------------------------------------------------ the six ways


def _by_source(mix: Mixture) -> Shares:
    """`weights`: of each source, the unnamed get nothing."""
    names = [source.name for source in mix.sources]
    weights = _named(mix, "weights", mix.stage.weights or {}, names, "source")
    return tuple(weights[name] for name in names)


def _by_language(mix: Mixture) -> Shares:
    """`language_weights`: of each language, the unnamed get nothing."""
    given = mix.stage.language_weights or {}
    if CODE in given:
        raise ConfigError(f"stage '{mix.name}': language_weights name 'code', which is no language; give code_share")
    return _in_languages(mix, _named(mix, "language_weights", given, mix.languages, "language"))


def _by_power(mix: Mixture) -> Shares:
    """`alpha`, `temperature`: tokens^alpha of each language (Conneau et al. 2020, XLM-R, arXiv 1911.02116)."""
    alpha, temperature = mix.stage.alpha, mix.stage.temperature
    if alpha is not None and not 0 <= alpha <= 1:
        hint = f"; a temperature of {alpha:g} is written temperature: {alpha:g}" if alpha > 1 else ""
        raise ConfigError(
            f"stage '{mix.name}': alpha ({alpha:g}) must lie between 0 (all alike) and 1 (by tokens){hint}"
        )
    if temperature is not None and not temperature >= 1:
        hint = f"; an exponent of {temperature:g} is written alpha: {temperature:g}" if temperature > 0 else ""
        raise ConfigError(
            f"stage '{mix.name}': temperature ({temperature:g}) is 1 / alpha, at least 1 (by tokens){hint}"
        )
    way = "alpha" if alpha is not None else "temperature"
    _refuse_empty(mix, way)
    tokens = dict.fromkeys(mix.languages, 0)
    for source, counted in zip(mix.sources, mix.counted, strict=True):
        if source.kind != "code" and source.weight:
            tokens[source.language] += counted.tokens
    with localcontext(Context(prec=POWER_DIGITS)):
        exponent = Decimal(repr(alpha)) if alpha is not None else 1 / Decimal(repr(temperature))
        powers = {code: int(Decimal(n) ** exponent * POWER_UNIT) for code, n in tokens.items() if n}
    return _in_languages(mix, _shares_of(powers, f"stage '{mix.name}': {way} has no text to read"))


def _by_unimax(mix: Mixture) -> Shares:
    """`unimax`: all languages alike, but no source more than so many epochs (Chung et al. 2023, arXiv 2304.09151).

    What a language cannot give without further epochs, the others give in equal parts; its sources share likewise, by
    their weights. Epochs count from the run's beginning, and not a sample more is read. How much text that is depends
    on how full the samples of the sources are: it goes up in straight lines from one source's end to the next one's.
    """
    cap = mix.stage.unimax
    assert cap is not None
    if not 0 < cap <= 1000:
        raise ConfigError(
            f"stage '{mix.name}': unimax ({cap:g}) is the most epochs of a source, above 0 and at most 1000"
        )
    _refuse_empty(mix, "unimax")
    rooms, of_text = _rooms(mix, decimal(cap, f"stage '{mix.name}': unimax")), 1 - mix.code
    code = _with_code(mix, [Fraction(0)] * len(mix.sources))
    beside = sum((share / part for share, part in zip(code, mix.fullness, strict=True)), Fraction(0))
    costs = [
        of_text / part + beside for part in mix.fullness
    ]  # samples for some text, and for the code it brings along

    def samples(text: Fraction) -> Fraction:
        return sum((part * cost for part, cost in zip(_alike(mix, rooms, text), costs, strict=True)), Fraction(0))

    wanted, ends = mix.samples * of_text, _ends(mix, rooms)
    if samples(ends[-1]) < wanted:
        needed = wanted * (ends[-1] / samples(ends[-1]) if ends[-1] else 1)
        raise ConfigError(
            f"stage '{mix.name}': unimax {cap:g} leaves {float(ends[-1]) * mix.block_length:,.0f} tokens to read, "
            f"the stage wants {float(needed) * mix.block_length:,.0f}; shorten it, add text or allow more epochs"
        )
    if not wanted:
        return code
    last = bisect_left(ends, wanted, key=samples)
    low, high = (samples(ends[i]) for i in (last - 1, last))
    text = ends[last - 1] + (ends[last] - ends[last - 1]) * (wanted - low) / (high - low)
    parts = _alike(mix, rooms, text)
    return tuple(part * of_text / text + share for part, share in zip(parts, code, strict=True))


def _rooms(mix: Mixture, epochs: Fraction) -> list[Fraction]:
    """Text that each source has left within so many epochs, in full samples; of code none."""
    slices = [
        max(epochs * counted.slices - taken - ROUNDING, Fraction(0))
        if weight and source.kind != "code"
        else Fraction(0)
        for source, counted, taken, weight in zip(mix.sources, mix.counted, mix.taken, mix.weights, strict=True)
    ]
    return [part * room for part, room in zip(mix.fullness, slices, strict=True)]


def _alike(mix: Mixture, rooms: Sequence[Fraction], text: Fraction) -> list[Fraction]:
    """So much text dealt out to all languages alike, and within each by weight, as far as there is room."""
    parts, members = [Fraction(0)] * len(mix.sources), mix.members
    room_of = [sum((rooms[i] for i in own), Fraction(0)) for own in members]
    for own, gift in zip(members, fill(text, [Fraction(1)] * len(members), room_of), strict=True):
        of_own = fill(gift, [mix.weights[i] for i in own], [rooms[i] for i in own])
        for i, part in zip(own, of_own, strict=True):
            parts[i] = part
    return parts


def _ends(mix: Mixture, rooms: Sequence[Fraction]) -> list[Fraction]:
    """The amounts of text, of all languages alike, at which a source has no more room; from 0 to all there is."""
    levels = {Fraction(0)}
    for own in mix.members:
        for rate in {rooms[i] / mix.weights[i] for i in own if mix.weights[i]}:
            levels.add(sum((min(rooms[i], rate * mix.weights[i]) for i in own), Fraction(0)))
    room_of = [sum((rooms[i] for i in own), Fraction(0)) for own in mix.members]
    return sorted({sum((min(level, room) for room in room_of), Fraction(0)) for level in levels})


def _by_dial(mix: Mixture, share: Fraction | None = None) -> Shares:
    """`non_english_share`: English and all others apart, by weight within each part."""
    given = mix.stage.non_english_share
    if share is None:
        assert isinstance(given, (int, float))
        share = decimal(given, f"stage '{mix.name}': non_english_share", most=1)
    parts = {ENGLISH: (1 - mix.code) * (1 - share), NON_ENGLISH: (1 - mix.code) * share, CODE: mix.code}
    return _spread(mix, parts, part_of, f"non_english_share ({float(share):g})")


WAY: dict[str, Callable[[Mixture], Shares]] = {
    "weights": _by_source, "language_weights": _by_language, "alpha": _by_power, "temperature": _by_power,
    "unimax": _by_unimax, "non_english_share": _by_dial,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ what they share


def fill(total: Fraction, weights: Sequence[Fraction], rooms: Sequence[Fraction]) -> list[Fraction]:
    """Deal a total out in proportion to weights, none more than its room: what one has no room for, the others get.

    Something is left over where all rooms together are less than the total.
    """
    given = [Fraction(0)] * len(weights)
    waiting = sorted((i for i, weight in enumerate(weights) if weight), key=lambda i: rooms[i] / weights[i])
    left, left_weight = total, sum(weights, Fraction(0))
    for i in waiting:
        given[i] = min(rooms[i], left * weights[i] / left_weight)
        left, left_weight = left - given[i], left_weight - weights[i]
    return given


def _named(
    mix: Mixture, way: str, given: dict[str, float], names: Sequence[str], what: str
) -> dict[str, Fraction]:  # fmt: skip
    """Weights by name as shares of one; refuses unknown names."""
    for name in given:
        if name not in names:
            raise ConfigError(
                f"stage '{mix.name}': {way} name an unknown {what} '{name}'; {nearest(name, list(names))}"
            )
    weights = {name: decimal(given.get(name, 0.0), f"stage '{mix.name}': weight of '{name}'") for name in names}
    message = f"stage '{mix.name}': the {way.replace('_', ' ')} add up to 0; give one {what} at least a weight above 0"
    return _shares_of(weights, message)


def _shares_of(weights: dict[str, Fraction] | dict[str, int], message: str) -> dict[str, Fraction]:
    total = sum(weights.values())
    if not total:
        raise ConfigError(message)
    return {name: Fraction(weight) / total for name, weight in weights.items()}


def _in_languages(mix: Mixture, of_language: dict[str, Fraction]) -> Shares:
    groups = {code: (1 - mix.code) * share for code, share in of_language.items()}
    return _spread(mix, {**groups, CODE: mix.code}, language_of, "its share")


def _with_code(mix: Mixture, shares: Sequence[Fraction]) -> Shares:
    code = _spread(mix, {CODE: mix.code}, language_of, "its share")
    return tuple(a + b for a, b in zip(shares, code, strict=True))


def _spread(
    mix: Mixture, groups: dict[str, Fraction], group_of: Callable[[Source], str], asked: str
) -> Shares:  # fmt: skip
    """Each group's share over its sources by their weights; refuses a share that no source can take."""
    shares = [Fraction(0)] * len(mix.sources)
    weights, members = mix.weights, [group_of(source) for source in mix.sources]
    for group, share in groups.items():
        total = sum((weight for weight, member in zip(weights, members, strict=True) if member == group), Fraction(0))
        if share and not total:
            asked = f"code_share ({float(mix.code):g})" if group == CODE else asked
            lack = f"all {group} sources have weight 0" if group in members else f"no source is {group}"
            raise ConfigError(f"stage '{mix.name}': {asked} needs a source that is {group}, but {lack}")
        for i, member in enumerate(members):
            if member == group and share:
                shares[i] = share * weights[i] / total
    return tuple(shares)


def _refuse_empty(mix: Mixture, way: str) -> None:
    """A language's tokens decide: an empty source would silently drop out."""
    for source, counted in zip(mix.sources, mix.counted, strict=True):
        if source.kind != "code" and source.weight and not counted.slices:
            raise _too_few(mix, counted, f"is to be read by {way} in stage '{mix.name}'")


def _refuse_unreadable(mix: Mixture, shares: Shares) -> None:
    for source, share in zip(mix.counted, shares, strict=True):
        if share and not source.slices:
            raise _too_few(mix, source, f"a share of {float(share):.4g} in stage '{mix.name}'")


def _too_few(mix: Mixture, source: PlanSource, but: str) -> DataError:
    return DataError(
        f"source '{source.name}' has {source.tokens} tokens, too few for one slice of {mix.block_length} + 1, "
        f"but {but}; add text or give it weight 0"
    )
