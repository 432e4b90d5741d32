#!/usr/bin/env python3
"""Draw a pipeline schedule, proved to run first; its makespan, bubble and memory."""

import math
import signal
import sys

from megapoly.arguments import ArgumentParser
from megapoly.errors import ConfigError, exit_on_error
from megapoly.parallel.drawing import draw_png, draw_text
from megapoly.parallel.schedule import SCHEDULES, check_arguments
from megapoly.parallel.schedule_check import check_schedule
from megapoly.parallel.timeline import Costs
from megapoly.pictures import checked_png

MOST_ACTIONS = 1 << 18


def parse_costs(text: str) -> Costs:
    """Three positive numbers F,I,W."""
    try:
        costs = [float(word) for word in text.split(",")]
    except ValueError:
        costs = []
    if len(costs) != 3 or not all(1e-6 <= cost <= 1e6 and math.isfinite(cost) for cost in costs):
        raise ConfigError(f"--costs ({text[:80]}) must be F,I,W: three numbers from 1e-6 to 1e6, such as 1,1,1")
    return Costs(costs[0], costs[1], costs[2])


@exit_on_error
def main(argv: list[str]) -> None:
    """Read the flags, prove the schedule, print the timeline and what is known of it."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the listing quietly
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--schedule", required=True, metavar="NAME", help=", ".join(SCHEDULES))
    parser.add_argument("--stages", required=True, type=int, metavar="P", help="pipeline ranks")
    parser.add_argument("--microbatches", required=True, type=int, metavar="M")
    parser.add_argument("--chunks", type=int, metavar="V", help="of a rank; default 2 for interleaved and zb-v, else 1")
    parser.add_argument(
        "--costs", default="1,1,1", metavar="F,I,W", help="of a rank: forward, input and weight gradient"
    )
    parser.add_argument("--png", type=checked_png, metavar="FILE", help="draw a picture too")
    args = parser.parse_args(argv)
    name, stages, microbatches = args.schedule, args.stages, args.microbatches
    chunks = (2 if name in ("interleaved", "zb-v") else 1) if args.chunks is None else args.chunks
    costs = parse_costs(args.costs)
    check_arguments(name, stages, chunks, microbatches)
    if (count := 3 * stages * chunks * microbatches) > MOST_ACTIONS:
        raise ConfigError(f"--stages x --chunks x --microbatches has {count} actions; {MOST_ACTIONS} can be shown")
    report = check_schedule(name, stages, chunks, microbatches, costs)
    timeline = report.timeline
    title = f"{name}: stages {stages}, chunks {chunks}, micro-batches {microbatches}, F,I,W {args.costs}"
    print(title)
    print(draw_text(timeline))
    print(f"makespan            {timeline.makespan:g}")
    print(f"bubble              {timeline.bubble:g}  (formula: {report.formula})")
    print(f"idle                {timeline.idle_share:.1%} of ranks x makespan")
    peaks = " ".join(f"{most / chunks:g}" for most in report.peaks)
    print(f"peak activations    {peaks}  (micro-batches of a whole rank, by rank)")
    if args.png is not None:
        draw_png(timeline, title, args.png)
        print(f"picture             {args.png}")


if __name__ == "__main__":
    main(sys.argv[1:])
