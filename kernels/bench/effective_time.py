"""What share of its time a job trains, by a model: python kernels/bench/effective_time.py --checkpoint FILE

    --checkpoint FILE   what saves cost here: written by kernels/bench/checkpoint.py --json FILE
    --stall S           .. or seconds that a save keeps the step, and
    --writing S         seconds that it takes to be written
    --restart S         seconds from a failure to the next step; default: measured here (restart.py), the median of
                        --rounds SIGKILLs to a rank of a `torchrun` job

The model (Young 1974, Daly 2006): of the time, stall / T is lost to saves every T seconds, and at each failure, which
come every MTBF, the restart and what was not saved yet: T / 2, and the time that a save takes to be written. The best
interval is T = sqrt(2 stall MTBF). Failures are --failures per 1000 nodes and day, by default 6.5: 11 months of a large
A100 cluster (Kokolis et al. 2024, arXiv 2410.21680).

What is measured is this host's, with a small model, and lacks what a large job's restart has beside: a start on many
hosts, one of them perhaps exchanged, NCCL's start, compilation, and the load of a large state. So the table has further
rows, marked as assumed: the measured restart without its load, --start-seconds, and a state of --gigabytes read at
--read-rate; the stall is --assumed-stall. The last rows add the time after which a hang is found, at each failure.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import restart
from results import environment, write_json

NOT_RUNNABLE = 2
DAY = 86400.0


@dataclass(frozen=True)
class Costs:
    """Seconds: that a save keeps the step, that it takes to be written, and of a restart."""

    stall: float
    writing: float
    restart: float


@dataclass(frozen=True)
class Estimate:
    """Of a job on some nodes: seconds between failures and between saves, and what shares of the time are lost."""

    nodes: int
    between_failures: float
    interval: float
    to_stalls: float
    to_redone_work: float
    to_restarts: float

    @property
    def effective(self) -> float:
        """The share of the time in which the job trains what counts."""
        return 1 - self.to_stalls - self.to_redone_work - self.to_restarts


def estimate(costs: Costs, nodes: int, failures: float) -> Estimate:
    """At the best interval; `failures` are those of 1000 nodes in a day."""
    between = 1000 * DAY / (failures * nodes)
    interval = math.sqrt(2 * costs.stall * between)
    redone = (interval / 2 + costs.writing) / between
    return Estimate(nodes, between, interval, costs.stall / interval, redone, costs.restart / between)


def costs_of_saves(document: dict[str, Any]) -> tuple[float, float]:
    """Seconds of the stall and of the writing of an asynchronous save, from the results of checkpoint.py.

    Steps beside a save are slower where ranks and writers share cores; the steps' loss of time counts as stall. How
    long a save is written is taken from the synchronous one, which does the same at once.
    """
    ranks = [{name: statistics.median(told) for name, told in row["told"].items()} for row in document["results"]]
    stall, writing = (max(rank[f"stall {name}"] for rank in ranks) for name in ("async", "sync"))
    slower = 1 - 1 / max(1.0, *(rank.get("beside", 1.0) for rank in ranks))
    return stall + slower * writing, writing


def read_costs(path: Path) -> tuple[float, float]:
    """Those of a results file."""
    return costs_of_saves(json.loads(path.read_text(encoding="utf-8")))


def cost_sets(measured: Costs, load: float, options: argparse.Namespace) -> dict[str, Costs]:
    """What is measured, and what is assumed of a large job: a state's load, its start, another stall; then hangs."""
    from megapoly.sections import ParallelConfig

    moved = options.gigabytes / options.read_rate
    large = Costs(options.assumed_stall, moved, measured.restart - load + moved + options.start_seconds)
    bound = 0.75 * 60 * ParallelConfig().distributed_timeout_minutes
    name = f"assumed: {options.gigabytes:g} GB at {options.read_rate:g} GB/s, {options.start_seconds:g} s to start"
    return {
        "measured on this host": measured,
        name: large,
        f"{name}, every failure a hang of {bound:g} s": replace(large, restart=large.restart + bound),
    }


def told(estimates: list[Estimate]) -> list[str]:
    """Lines of the table."""
    lines = [f"  {'nodes':>6}{'MTBF':>10}{'save every':>12}{'effective':>11}   lost to stalls, redone work, restarts"]
    for e in estimates:
        shares = ", ".join(f"{share:.3%}" for share in (e.to_stalls, e.to_redone_work, e.to_restarts))
        hours, minutes = e.between_failures / 3600, e.interval / 60
        lines.append(f"  {e.nodes:>6}{hours:>8.1f} h{minutes:>8.1f} min{e.effective:>11.2%}   {shares}")
    return lines


def parsed() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="results of checkpoint.py")
    parser.add_argument("--stall", type=float, help="above 0; needs --writing")
    parser.add_argument("--writing", type=float)
    parser.add_argument("--restart", type=float)
    parser.add_argument("--nodes", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--failures", type=float, default=6.5, help="per 1000 nodes and day")
    parser.add_argument("--ranks", type=int, default=2, help="of the job that is killed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--start-seconds", type=float, default=180.0, help="assumed: of a large job's start")
    parser.add_argument("--gigabytes", type=float, default=156.0, help="assumed: state, 13B parameters x 12 bytes")
    parser.add_argument("--read-rate", type=float, default=2.0, help="assumed: GB/s of all ranks, read and written")
    parser.add_argument("--assumed-stall", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="one restart of a tiny model: whether it runs")
    options = parser.parse_args()
    if (options.stall is None) != (options.writing is None):
        parser.error("--stall and --writing go together")
    if options.stall is not None and not (0 < options.stall < math.inf and 0 <= options.writing < math.inf):
        parser.error("--stall must be above 0, --writing at least 0, both finite")
    if options.smoke:
        options.hidden, options.layers, options.rounds = 64, 1, 1
    return options


def main() -> int:
    """Measure what is not given, and print the estimate."""
    options = parsed()
    try:
        stall, writing = (
            costs_of_saves(json.loads(options.checkpoint.read_text()))
            if options.stall is None
            else (options.stall, options.writing)
        )
    except (AttributeError, OSError, KeyError, ValueError):
        print("give --stall and --writing, or --checkpoint FILE: written by make bench-checkpoint FLAGS='--json FILE'")
        return NOT_RUNNABLE
    measured: dict[str, Any] = {"parts": {"load": 0.0}}
    if options.restart is None:
        with tempfile.TemporaryDirectory() as folder:
            measured = restart.measure(Path(folder), options.ranks, options.rounds, options.hidden, options.layers)
        print(f"restart of {options.ranks} ranks, {measured['loaded'] / 1e9:.3f} GB of state, {options.rounds} rounds")
        for part, seconds in measured["parts"].items():
            print(f"  {part:<16}{seconds:8.2f} s")
    costs = Costs(stall, writing, options.restart if options.restart is not None else measured["seconds"])
    sets = cost_sets(costs, measured["parts"]["load"], options)
    rows = {name: [estimate(one, nodes, options.failures) for nodes in options.nodes] for name, one in sets.items()}
    for name, estimates in rows.items():
        one = sets[name]
        print(f"{name}: stall {one.stall:.2f} s, written in {one.writing:.1f} s, restart {one.restart:.1f} s")
        print("\n".join(told(estimates)))
    if options.json:
        kept = {name: [vars(e) | {"effective": e.effective} for e in estimates] for name, estimates in rows.items()}
        found = {"costs": {name: vars(one) for name, one in sets.items()}, "restart": measured, "estimates": kept}
        write_json(options.json, environment(options.smoke) | found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
