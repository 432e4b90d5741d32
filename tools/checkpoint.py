"""Looks at checkpoints, without a GPU: python tools/checkpoint.py {list,verify,show,diff} CKPT [CKPT] [--json]

A CKPT is a run, its checkpoints/ or a step folder.
"""

import argparse
import json
import sys
from pathlib import Path

from megapoly.arguments import ArgumentParser
from megapoly.checkpoint.load import CheckpointReader, find_checkpoint
from megapoly.checkpoint.report import contents, described, differences, listed, listing, verify
from megapoly.errors import EXIT_STATUS, exit_on_error

DIFFERENT = 1


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="List, verify, show and compare checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=ArgumentParser)
    for name, what in (
        ("list", "the checkpoints of a run, the newest first; * is the one that `latest` names"),
        ("verify", "read every byte against its checksum; status 2 where any is damaged"),
        ("show", "state, shapes and types"),
        ("diff", "in what two checkpoints differ, entry by entry and tensor by tensor; status 1 where they do"),
    ):
        command = commands.add_parser(name, description=what, help=what)
        command.add_argument("path", metavar="CKPT")
        if name == "diff":
            command.add_argument("other", metavar="CKPT")
        if name == "verify":
            command.add_argument("--all", action="store_true", help="all checkpoints of the run")
        command.add_argument("--json", action="store_true", help="JSON instead of text")
    return parser.parse_args()


def run_verify(arguments: argparse.Namespace) -> int:
    """Verify one checkpoint or all of a run, `latest` included; returns the exit status."""
    if arguments.all:
        found = [(Path(entry["folder"]), entry["problem"]) for entry in listing(arguments.path)]
    else:
        found = [(find_checkpoint(arguments.path), None)]
    status = 0
    for folder, problem in found:
        problems = verify(folder) if problem is None else [problem]
        status = EXIT_STATUS if problems else status
        if arguments.json:
            print(json.dumps({"folder": str(folder), "problems": problems}))
        else:
            print("\n".join(f"{folder}: DAMAGED: {problem}" for problem in problems) or f"{folder}: whole")
    return status


@exit_on_error
def main() -> None:
    arguments = parse_arguments()
    if arguments.command == "list":
        for entry in listing(arguments.path):
            print(json.dumps(entry) if arguments.json else listed(entry))
    elif arguments.command == "verify":
        sys.exit(run_verify(arguments))
    elif arguments.command == "show":
        found = contents(CheckpointReader.open(arguments.path))
        print(json.dumps(found) if arguments.json else described(found))
    else:
        lines = list(differences(*(CheckpointReader.open(path) for path in (arguments.path, arguments.other))))
        print(json.dumps(lines) if arguments.json else "\n".join(lines or ["no difference"]))
        sys.exit(DIFFERENT if lines else 0)


if __name__ == "__main__":
    main()
