"""Cleans and deduplicates a corpus: python tools/clean_corpus.py --input 'web/*.jsonl.gz' --output-dir cleaned"""

import argparse
import os

from megapoly.arguments import ArgumentParser
from megapoly.data.clean.machines import EXECUTORS, Machines
from megapoly.data.clean.pipeline import Reading, clean_corpus
from megapoly.data.clean.tables import table
from megapoly.data.text_input import Limits
from megapoly.errors import ConfigError, exit_on_error


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Languages, quality, personal data, duplicates; a report (docs/cleaning.md).")
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files and patterns: JSONL (plain, .gz, .zst), .parquet")
    add("--output-dir", required=True, help="DIR/LANG/NNNNN.jsonl.gz, DIR/report.md, DIR/removed, DIR/plots")
    add("--config", help="YAML with what differs from the defaults")
    add("--json-key", default="text", help="key (column) with the text")
    add("--language-key", default="lang", help="key (column) of the language; found where it is missing")
    add("--on-bad-line", choices=("error", "skip"), default="error", help="skip counts and reports")
    add("--max-line-mib", type=int, default=32, help="a longer line is a bad line; bounds memory")
    add("--max-expansion", type=float, default=200.0, help="most bytes of text for a byte of a compressed file")
    add("--executor", choices=EXECUTORS, default="local")
    add("--tasks", type=int, help="parts of the work (default: by the inputs' number and size)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="tasks at once")
    add("--restart", action="store_true", help="do not go on with an earlier run of other settings")
    add("--partition", default="", help="Slurm's partition")
    add("--time", default="24:00:00", help="Slurm's limit for one task")
    add("--gib-per-task", type=int, default=4, help="memory of a task on Slurm and Ray")
    add("--sbatch", nargs="+", default=[], metavar="NAME=VALUE", help="further arguments of sbatch: account=me")
    return parser.parse_args()


@exit_on_error
def main() -> None:
    arguments = parse_arguments()
    if wrong := [given for given in arguments.sbatch if "=" not in given]:
        raise ConfigError(f"--sbatch takes NAME=VALUE, not '{wrong[0]}'")
    report = clean_corpus(
        arguments.input,
        arguments.output_dir,
        arguments.config,
        arguments.tasks,
        Reading(
            arguments.json_key,
            arguments.language_key,
            arguments.on_bad_line == "skip",
            Limits(arguments.max_line_mib << 20, arguments.max_expansion),
        ),
        Machines(
            executor=arguments.executor,
            workers=arguments.workers,
            partition=arguments.partition,
            time=arguments.time,
            gib_per_task=arguments.gib_per_task,
            sbatch=dict(given.split("=", 1) for given in arguments.sbatch),
        ),
        arguments.restart,
    )
    if report is None:
        print("submitted; the report is written by the last job")
    else:
        print("\n".join(table(report)))


if __name__ == "__main__":
    main()
