"""The plan as PNG, or a run beside its plan: shares over tokens, losses below, every language's share to the right."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megapoly.data.curriculum import Plan
from megapoly.data.plan_picture import SAMPLES_OF_WINDOW, Window, colour_of, short, stack_order, windows
from megapoly.data.realised import Row, losses_by_language, stage_of, tokens_by_language
from megapoly.data.sources import language_of
from megapoly.errors import ConfigError

WINDOWS = 400
LOSS_POINTS = 60
LEAST_OF_RUN = 0.03  # a language with less of the run's tokens stands with others of its kind
OTHERS_COLOUR = "#c8ced6"
STAGE_COLOURS = ("#3b5b92", "#d9822b", "#3f9b57", "#a23b72", "#7a6a53", "#1f8a8a")
DASHES = (0, (4, 2))


@dataclass(frozen=True)
class Groups:
    """Languages from the bottom of the stack up, and those that are too thin to be seen as one group among them."""

    order: list[str]
    group_of: dict[str, str]
    colours: dict[str, str]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(self.group_of[language] for language in self.order))

    def sums(self, shares: dict[str, float]) -> dict[str, float]:
        """Shares by language summed by group."""
        found = dict.fromkeys(self.names, 0.0)
        for language in self.order:
            found[self.group_of[language]] += shares[language]
        return found


def groups_of(plan: Plan) -> Groups:
    """English, code and the languages with enough tokens by themselves; two thin ones and more as one group."""
    order, tokens = stack_order(plan), dict.fromkeys(map(language_of, plan.sources), 0)
    for source, count in zip(plan.sources, plan.sampler().counts(plan.num_samples), strict=True):
        tokens[language_of(source)] += count
    thin = [x for x in order if tokens[x] < LEAST_OF_RUN * plan.num_samples and x not in ("en", "code")]
    together = f"{len(thin)} others" if len(thin) > 1 else ""
    group_of = {x: together if together and x in thin else x for x in order}
    return Groups(order, group_of, colour_of(order) | {together: OTHERS_COLOUR})


def draw_png(plan: Plan, path: str, rows: Sequence[Row] = ()) -> None:
    """Draw the plan as the sampler serves it, or with the rows of metrics.jsonl what the run has read, and its losses.

    ConfigError without matplotlib or a place to write.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(f"{path}: drawing needs matplotlib; pip install 'megapoly[plot]'") from None
    groups = groups_of(plan)
    figure = Figure(figsize=(13, 7.5 if rows else 6.0), layout="constrained")
    heights = [3, 2] if rows else [1]
    grid = figure.add_gridspec(len(heights), 2, width_ratios=[2.6, 1], height_ratios=heights)
    shares = figure.add_subplot(grid[0, 0])
    _draw_shares(plan, groups, _windows_of_run(plan, rows) if rows else windows(plan, WINDOWS), shares)
    panels = [shares]
    if rows:
        panels.append(figure.add_subplot(grid[1, 0], sharex=shares))
        _draw_losses(plan, groups, rows, panels[1])
    for axes in panels:
        axes.set_xlim(0, plan.num_samples * plan.block_length)
        axes.xaxis.set_major_formatter(lambda x, _: short(x))
        for stage in plan.stages[1:]:
            axes.axvline(stage.begin_sample * plan.block_length, color="black", linewidth=1.2)
    panels[-1].set_xlabel("tokens")
    _name_stages(plan, shares)
    _draw_languages(plan, groups.order, rows, figure.add_subplot(grid[:, 1]))
    try:
        figure.savefig(path, format="png", dpi=100)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def _windows_of_run(plan: Plan, rows: Sequence[Row]) -> list[Window]:
    """Steps of one stage put together until they have samples enough to show shares."""
    least = max(plan.num_samples // WINDOWS, SAMPLES_OF_WINDOW)
    found, first, begin = [], 0, 0
    for at, row in enumerate(rows):
        stage, is_last = stage_of(plan, rows, at), at == len(rows) - 1
        if is_last or row["samples"] - begin >= least or stage_of(plan, rows, at + 1) != stage:
            tokens = tokens_by_language(plan, rows[first : at + 1])
            total = sum(tokens.values())
            found.append(Window(begin, row["samples"], stage, {x: n / total for x, n in tokens.items()}))
            first, begin = at + 1, row["samples"]
    return found


def _draw_shares(plan: Plan, groups: Groups, seen: Sequence[Window], axes: Any) -> None:
    """Stacked areas with the groups' names in them, and the planned borders between them as dashed lines."""
    edges = [window.begin * plan.block_length for window in seen] + [seen[-1].end * plan.block_length]
    sums = [groups.sums(window.shares) for window in (*seen, seen[-1])]
    heights = [[100 * of[name] for of in sums] for name in groups.names]
    axes.stackplot(edges, heights, step="post", colors=[groups.colours[name] for name in groups.names], linewidth=0)
    stretches = [stretch for stage in plan.stages for stretch in stage.stretches()]
    at = [begin * plan.block_length for begin, _, _ in stretches] + [plan.num_samples * plan.block_length]
    languages = [language_of(source) for source in plan.sources]
    planned = []
    for _, _, shares in stretches:
        by_language = dict.fromkeys(languages, 0.0)
        for language, share in zip(languages, shares, strict=True):
            by_language[language] += float(share)
        planned.append(groups.sums(by_language))
    level = [0.0] * len(planned)
    for name in groups.names[:-1]:
        level = [below + 100 * of[name] for below, of in zip(level, planned, strict=True)]
        line = axes.step(at, [*level, level[-1]], where="post", color="black", linewidth=1.0, linestyle=DASHES)
        line[0].set_label("as planned" if name == groups.names[0] else "_")
    handles = [axes.collections[i] for i in reversed(range(len(groups.names)))]
    labels = list(reversed(groups.names))
    axes.legend(
        [*handles, *axes.get_lines()[:1]], [*labels, *(["as planned"] if axes.get_lines() else [])], frameon=True,
        loc="lower left", fontsize=9, ncols=max(1, len(labels) // 6),
    )  # fmt: skip
    axes.set(ylim=(0, 100), ylabel="share of the tokens, %")


def _draw_losses(plan: Plan, groups: Groups, rows: Sequence[Row], axes: Any) -> None:
    """Mean loss of each group over stretches of the run."""
    number = min(len(rows), LOSS_POINTS)
    borders = [len(rows) * i // number for i in range(number + 1)]
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in groups.names}
    for first, last in itertools.pairwise(borders):
        part, begin = rows[first:last], rows[first - 1]["samples"] if first else 0
        middle = (begin + part[-1]["samples"]) / 2 * plan.block_length
        for name, loss in losses_by_language(plan, part, groups.group_of).items():
            points[name].append((middle, loss))
    for name, found in points.items():
        colour = "#7d8793" if groups.colours[name] == OTHERS_COLOUR else groups.colours[name]
        axes.plot(*zip(*found, strict=True), color=colour, label=name, linewidth=1.6) if found else None
    axes.legend(loc="upper right", fontsize=9)
    axes.grid(axis="y", color="#e3e3e3", linewidth=0.6)
    axes.set_ylabel("loss, nats a token")


def _name_stages(plan: Plan, axes: Any) -> None:
    """Each stage's name and budget above it; slanted and without the budget where they would meet."""
    widest = max(len(stage.name) * plan.num_samples / stage.samples for stage in plan.stages)
    way = {"rotation": 30, "ha": "left"} if widest > 85 else {"ha": "center"}
    for stage in plan.stages:
        begin, end = stage.begin_sample * plan.block_length, stage.end_sample * plan.block_length
        label = f"{stage.name}\n{short(end - begin)} tokens" if widest <= 85 else stage.name
        axes.text((begin + end) / 2, 101, label, va="bottom", fontsize=9, clip_on=False, **way)


def _draw_languages(plan: Plan, order: Sequence[str], rows: Sequence[Row], axes: Any) -> None:
    """A line for each language with its share of every stage, on a logarithmic scale: planned a bar, real a dot."""
    place = {language: i for i, language in enumerate(order)}
    for number, stage in enumerate(plan.stages):
        planned, real = _of_stage(plan, number, rows)
        colour = STAGE_COLOURS[number % len(STAGE_COLOURS)]
        wanted = [(100 * planned[x], place[x]) for x in order if planned[x]]
        axes.scatter(*zip(*wanted, strict=True), marker="|", s=110, color=colour, linewidth=1.8)
        served = [(100 * real[x], place[x]) for x in order if real.get(x)]
        x, y = zip(*served, strict=True) if served else ((), ())
        axes.scatter(x, y, marker="o", s=26, color=colour, alpha=0.75, label=stage.name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_yticks(range(len(order)), order, fontsize=9)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.grid(color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("share of the stage, % (bar: planned, dot: read)")
    axes.legend(loc="best", fontsize=9)


def _of_stage(plan: Plan, number: int, rows: Sequence[Row]) -> tuple[dict[str, float], dict[str, float]]:
    """Planned and realised shares by language of a stage; realised by the rows where there are any."""
    stage, languages = plan.stages[number], [language_of(source) for source in plan.sources]
    planned = dict.fromkeys(languages, 0.0)
    for language, share in zip(languages, stage.shares, strict=True):
        planned[language] += float(share)
    if rows:
        own = [row for at, row in enumerate(rows) if stage_of(plan, rows, at) == number]
        counts = tokens_by_language(plan, own)
    else:
        counts = dict.fromkeys(languages, 0)
        ends = zip(plan.sampler().counts(stage.end_sample), plan.sampler().counts(stage.begin_sample), strict=True)
        for language, (after, before) in zip(languages, ends, strict=True):
            counts[language] += after - before
    total = max(sum(counts.values()), 1)
    return planned, {language: count / total for language, count in counts.items()}
