"""The plan as PNG, or a run beside its plan: shares over tokens, losses below, every language's share to the right."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megapoly.data.curriculum import Plan
from megapoly.data.plan_picture import SAMPLES_OF_WINDOW, Window, colour_of, short, stack_order, windows
from megapoly.data.realised import Steps, by_language, losses_by_language, planned_shares
from megapoly.pictures import save_png

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
    order, tokens = stack_order(plan), by_language(plan, plan.text(plan.sampler().counts(plan.num_samples)))
    thin = [x for x in order if tokens[x] < LEAST_OF_RUN * plan.num_samples and x not in ("en", "code")]
    together = f"{len(thin)} others" if len(thin) > 1 else ""
    group_of = {x: together if together and x in thin else x for x in order}
    return Groups(order, group_of, colour_of(order) | {together: OTHERS_COLOUR})


def draw_png(plan: Plan, path: str, steps: Steps | None = None) -> None:
    """Draw the plan as the sampler serves it, or with the steps of a run what it has read, and its losses.

    ConfigError where it cannot be written.
    """
    from matplotlib.figure import Figure

    groups = groups_of(plan)
    figure = Figure(figsize=(13, 7.5 if steps else 6.0), layout="constrained")
    heights = [3, 2] if steps else [1]
    grid = figure.add_gridspec(len(heights), 2, width_ratios=[2.6, 1], height_ratios=heights)
    shares = figure.add_subplot(grid[0, 0])
    _draw_shares(plan, groups, _windows_of_run(plan, steps) if steps else windows(plan, WINDOWS), shares)
    panels = [shares]
    if steps:
        panels.append(figure.add_subplot(grid[1, 0], sharex=shares))
        _draw_losses(plan, groups, steps, panels[1])
    for axes in panels:
        axes.set_xlim(0, plan.num_samples * plan.block_length)
        axes.xaxis.set_major_formatter(lambda x, _: short(x))
        for stage in plan.stages[1:]:
            axes.axvline(stage.begin_sample * plan.block_length, color="black", linewidth=1.2)
    panels[-1].set_xlabel("tokens")
    _name_stages(plan, shares)
    _draw_languages(plan, groups.order, steps, figure.add_subplot(grid[:, 1]))
    save_png(figure, path, 100)


def _windows_of_run(plan: Plan, steps: Steps) -> list[Window]:
    """Steps of one stage put together until they have samples enough to show shares."""
    least, found = max(plan.num_samples // WINDOWS, SAMPLES_OF_WINDOW), []
    borders = steps.of_stages(plan)
    for stage, (first, end) in enumerate(itertools.pairwise(borders)):
        begin = first
        for last in range(first + 1, end + 1):
            before, after = steps.ends[[begin, last]].tolist()
            if last == end or after - before >= least:
                tokens = by_language(plan, steps.tokens_RS[begin:last].sum(0).tolist())
                total = max(sum(tokens.values()), 1)
                found.append(Window(before, after, stage, {x: n / total for x, n in tokens.items()}))
                begin = last
    return found


def _draw_shares(plan: Plan, groups: Groups, seen: Sequence[Window], axes: Any) -> None:
    """Stacked areas with the groups' names in them, and the planned borders between them as dashed lines."""
    edges = [window.begin * plan.block_length for window in seen] + [seen[-1].end * plan.block_length]
    sums = [groups.sums(window.shares) for window in (*seen, seen[-1])]
    heights = [[100 * of[name] for of in sums] for name in groups.names]
    axes.stackplot(edges, heights, step="post", colors=[groups.colours[name] for name in groups.names], linewidth=0)
    stretches = [stretch for stage in plan.stages for stretch in stage.stretches()]
    at = [begin * plan.block_length for begin, _, _ in stretches] + [plan.num_samples * plan.block_length]
    planned = [groups.sums(by_language(plan, map(float, plan.text_shares(shares)))) for _, _, shares in stretches]
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


def _draw_losses(plan: Plan, groups: Groups, steps: Steps, axes: Any) -> None:
    """Mean loss of each group over stretches of the run."""
    number = min(steps.num, LOSS_POINTS)
    borders = [steps.num * i // number for i in range(number + 1)]
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in groups.names}
    for first, last in itertools.pairwise(borders):
        middle = float(steps.ends[first] + steps.ends[last]) / 2 * plan.block_length
        for name, loss in losses_by_language(plan, steps, first, last, groups.group_of).items():
            points[name].append((middle, loss))
    for name, found in points.items():
        colour = "#7d8793" if groups.colours[name] == OTHERS_COLOUR else groups.colours[name]
        axes.plot(*zip(*found, strict=True), color=colour, label=name, linewidth=1.6) if found else None
    axes.legend(loc="best", fontsize=9)
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


def _draw_languages(plan: Plan, order: Sequence[str], steps: Steps | None, axes: Any) -> None:
    """A line for each language with its share of every stage, on a logarithmic scale: planned a bar, real a dot."""
    place = {language: i for i, language in enumerate(order)}
    for number, stage in enumerate(plan.stages):
        planned, real = _of_stage(plan, number, steps)
        colour = STAGE_COLOURS[number % len(STAGE_COLOURS)]
        wanted = [(100 * planned[x], place[x]) for x in order if planned[x]]
        x, y = zip(*wanted, strict=True) if wanted else ((), ())  # of a run: all of a stage may have been left out
        axes.scatter(x, y, marker="|", s=110, color=colour, linewidth=1.8)
        served = [(100 * real[x], place[x]) for x in order if real.get(x)]
        x, y = zip(*served, strict=True) if served else ((), ())
        axes.scatter(x, y, marker="o", s=26, color=colour, alpha=0.75, label=stage.name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    axes.set_yticks(range(len(order)), order, fontsize=9)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.grid(color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("share of the stage, % (bar: planned, dot: read)")
    axes.legend(loc="best", fontsize=9)


def _of_stage(plan: Plan, number: int, steps: Steps | None) -> tuple[dict[str, float], dict[str, float]]:
    """Planned and realised shares by language of a stage; of a run, both of the samples that it has read."""
    stage = plan.stages[number]
    planned: Iterable[float] = map(float, plan.text_shares(stage.shares))
    if steps is None:
        before, after = (plan.sampler().counts(end) for end in (stage.begin_sample, stage.end_sample))
        counts = by_language(plan, map(float, plan.text([b - a for a, b in zip(before, after, strict=True)])))
    else:
        first, last = steps.of_stages(plan)[number : number + 2]
        counts = by_language(plan, steps.tokens_RS[first:last].sum(0).tolist())
        if first < last:
            planned = planned_shares(plan, steps, first, last)
    total = sum(counts.values()) or 1
    return by_language(plan, planned), {x: count / total for x, count in counts.items()}
