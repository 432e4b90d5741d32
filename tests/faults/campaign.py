"""Many fault trials one after the other, and their report: what `make test-faults` runs.

python tests/faults/campaign.py --trials 200 --json FILE      FILE has a line a trial; called again it goes on there
python tests/faults/campaign.py --seed N [--kind "fill the disk"]      one trial again
python tests/faults/campaign.py --json FILE --report           the table of what FILE has
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fault_jobs import INTERVAL, Bench
from fault_kinds import KINDS
from fault_trials import run_trial

IN_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def table(outcomes: list[dict[str, Any]]) -> str:
    """The report in Markdown: a row a kind of fault, and one for all."""
    head = "fault | trials | restarts | commands anew | most steps lost | damaged | detected | failed | where it struck"
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    done = [outcome for outcome in outcomes if outcome["moment"] != "missed"]
    for kind in [*KINDS, "all"]:
        rows = [outcome for outcome in done if kind in ("all", outcome["kind"])]
        if not rows:
            continue
        moments = [row["moment"].partition(" ")[0] for row in rows]
        where = ", ".join(f"{moments.count(moment)} {moment}" for moment in sorted(set(moments)))
        sums = [sum(row[key] for row in rows) for key in ("restarts", "starts", "damaged", "detected")]
        failed = sum(bool(row["problem"]) for row in rows)
        cells = [kind, len(rows), *sums[:2], max(row["lost"] for row in rows), *sums[2:], failed, where]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", f"A checkpoint every {INTERVAL} steps; {len(outcomes) - len(done)} trials missed."])


def said(outcome: dict[str, Any]) -> str:
    """A trial as a line."""
    told = f"lost {outcome['lost']}, restarts {outcome['restarts']}, {outcome['seconds']} s"
    verdict = f"FAILED: {outcome['problem']}" if outcome["problem"] else "ok"
    return f"seed {outcome['seed']}: {outcome['kind']} ({outcome['moment']}), {outcome['layout']}: {told}: {verdict}"


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="of different seeds, those in --json included")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="only this trial")
    parser.add_argument("--kind", choices=KINDS, help="only this fault; else the seed chooses")
    parser.add_argument("--json", type=Path, help="file of outcomes, one a line")
    parser.add_argument("--report", action="store_true", help="no trials, only the table")
    parser.add_argument("--folder", type=Path, help="where the jobs run; default: a temporary folder")
    parser.add_argument("--logs", type=Path, help="folder that gets the log of every trial")
    return parser.parse_args()


def _may_have_namespace() -> bool:
    can_try = shutil.which("unshare") is not None
    return can_try and subprocess.run([*IN_NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


def main() -> int:
    """Run what is missing and print the table; 1 where a promise was not kept."""
    args = flags()
    # In a namespace of its own it may mount the small file systems of `fill the disk` without being root.
    if os.environ.get("MEGAPOLY_FAULTS") != "inside" and _may_have_namespace():
        os.environ["MEGAPOLY_FAULTS"] = "inside"
        os.execvp("unshare", [*IN_NAMESPACE, sys.executable, *sys.argv])
    known = args.json.read_text().splitlines() if args.json is not None and args.json.is_file() else []
    outcomes = [json.loads(line) for line in known]
    seeds = range(args.first, args.first + args.trials) if args.seed is None else [args.seed]
    seeds = [] if args.report else [seed for seed in seeds if seed not in {known["seed"] for known in outcomes}]
    home = tempfile.mkdtemp(prefix="faults-", dir=args.folder)
    if seeds:
        bench = Bench(Path(home))
    for seed in seeds:
        outcomes.append(run_trial(bench, seed, args.kind, args.logs).as_dict())
        print(said(outcomes[-1]), flush=True)
        if args.json is not None:
            with args.json.open("a") as file:
                file.write(json.dumps(outcomes[-1]) + "\n")
    print(table(outcomes))
    is_bad = any(outcome["problem"] for outcome in outcomes)
    if not is_bad:
        shutil.rmtree(home)
    return int(is_bad)


if __name__ == "__main__":
    sys.exit(main())
