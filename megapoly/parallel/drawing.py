"""A timeline of a schedule as text or PNG."""

from megapoly.parallel.schedule import Action
from megapoly.parallel.timeline import Timeline
from megapoly.pictures import save_png

WIDEST_ROW = 20_000  # characters
COLOURS = {"F": "#4c78a8", "H": "#e45756", "B": "#f58518", "I": "#54a24b", "W": "#b279a2"}


def draw_text(timeline: Timeline) -> str:
    """One row a rank, time to the right: kind, micro-batch and, of several, the chunk as a letter; idle: dots."""
    chunks = max(event.action.chunk for events in timeline.ranks for event in events) + 1
    label = {event.action: _label(event.action, chunks) for events in timeline.ranks for event in events}
    shortest = min(end - start for events in timeline.ranks for _, start, end in events)
    scale = min((max(map(len, label.values())) + 1) / shortest, WIDEST_ROW / timeline.makespan)
    rows = []
    for rank, events in enumerate(timeline.ranks):
        row = ["."] * round(timeline.makespan * scale)
        for action, start, end in events:
            begin, width = round(start * scale), round(end * scale) - round(start * scale)
            row[begin : begin + width] = (label[action][: width - 1].ljust(width - 1, "-") + " ")[:width]
        rows.append(f"rank {rank:>{len(str(len(timeline.ranks) - 1))}} |{''.join(row)}|")
    return "\n".join(rows)


def _label(action: Action, chunks: int) -> str:
    letter = chr(ord("a") + action.chunk % 26) if chunks > 1 else ""
    return f"{action.kind}{action.microbatch}{letter}"


def draw_png(timeline: Timeline, title: str, path: str) -> None:
    """The same as a picture; the chunks of a rank are shades of a colour."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    ranks = len(timeline.ranks)
    chunks = max(event.action.chunk for events in timeline.ranks for event in events) + 1
    numbered = max(map(len, timeline.ranks)) <= 150
    figure = Figure(figsize=(16, 1.2 + 0.45 * min(ranks, 64)), layout="constrained")
    axes = figure.add_subplot()
    for rank, events in enumerate(timeline.ranks):
        for kind, colour in COLOURS.items():
            for chunk in range(chunks):
                bars = [(s, e - s) for (k, _, c), s, e in events if (k, c) == (kind, chunk)]
                axes.broken_barh(
                    bars, (rank - 0.45, 0.9), facecolors=colour, alpha=1 - 0.6 * chunk / chunks,
                    edgecolor="white", linewidth=0.4 if numbered else 0.0,
                )  # fmt: skip
        for action, start, end in events if numbered else ():
            axes.text((start + end) / 2, rank, str(action.microbatch), ha="center", va="center", fontsize=6)
    for kind in sorted({event.action.kind for events in timeline.ranks for event in events}, key=list(COLOURS).index):
        axes.broken_barh([], (0, 0), facecolors=COLOURS[kind], label=kind)
    axes.set(xlim=(0, timeline.makespan), ylim=(ranks - 0.5, -0.5), xlabel="time", ylabel="rank", title=title)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    save_png(figure, path, 120)
