"""Show a data plan before any training: python tools/curriculum.py CONFIG [--json] [--samples A:B] [--flag value ..]"""

import argparse
import json
import re
import signal
import sys

from megapoly.cli import help_text, parse_flags, refuse_unknown
from megapoly.config import load_config
from megapoly.data.curriculum import Plan, describe, make_plan, open_sources, summary
from megapoly.errors import ConfigError, exit_on_error

USAGE = (
    "usage: tools/curriculum.py CONFIG [--json] [--samples A:B] [--flag value ..]\n\n"
    "  CONFIG         a YAML file or the name of a preset\n"
    "  --json         the plan as one JSON object instead of tables\n"
    "  --samples A:B  samples A to B (B excluded, counted from 0) as JSON lines instead\n"
)
CHUNK = 1 << 14


def parse_range(text: str, num_samples: int) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]*):([0-9]*)", text)
    if not match:
        raise ConfigError(f"--samples ({text}) must be A:B, two sample numbers such as 0:100")
    begin, end = int(match[1] or 0), int(match[2] or num_samples)
    if not begin <= end <= num_samples:
        raise ConfigError(f"--samples ({text}) must be a range within the plan's {num_samples} samples")
    return begin, end


def print_samples(plan: Plan, begin: int, end: int) -> None:
    sampler = plan.sampler()
    for first in range(begin, end, CHUNK):
        chunk = sampler.samples(first, min(first + CHUNK, end))
        for sample, (source, epoch, offset) in enumerate(zip(*(a.tolist() for a in chunk), strict=True), start=first):
            stage, name = plan.stages[plan.stage_at(sample)].name, plan.sources[source].name
            line = {"sample": sample, "stage": stage, "source": name, "epoch": epoch, "offset": offset}
            print(json.dumps(line, ensure_ascii=False))


@exit_on_error
def main(argv: list[str]) -> None:
    # A reader that closes early, as `| head` does, ends the listing quietly.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if not argv or {"-h", "--help"} & set(argv):
        print(help_text(USAGE))
        return
    flags, words = parse_flags(argv)
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--samples", nargs="?", const="")
    parser.add_argument("--config", nargs="?")
    options, rest = parser.parse_known_args(words)
    positional = [word for word in rest if not word.startswith("--")]
    config = options.config or (positional[0] if positional else None)
    refuse_unknown([word for word in rest if word != config], known=("json", "samples", "config"))
    if config is None:
        raise ConfigError("no config is given: tools/curriculum.py CONFIG, a YAML file or the name of a preset")
    cfg = load_config(config, flags)
    plan = make_plan(cfg, [stream.num_tokens for stream in open_sources(cfg)])
    if options.samples is not None:
        print_samples(plan, *parse_range(options.samples, plan.num_samples))
    elif options.json:
        print(json.dumps(summary(plan), indent=2, ensure_ascii=False))
    else:
        print(describe(plan))


if __name__ == "__main__":
    main(sys.argv[1:])
