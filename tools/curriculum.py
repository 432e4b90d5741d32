"""Show a data plan before any training, or what a run has read of it: python tools/curriculum.py CONFIG | --run RUN"""

import json
import signal
import sys
from pathlib import Path

from megapoly.arguments import ArgumentParser
from megapoly.checks import check_model, check_stages, check_training
from megapoly.cli import help_text, parse_flags, refuse_unknown
from megapoly.config import load_config
from megapoly.data.curriculum import open_sources, plan_for
from megapoly.data.plan_picture import draw_text
from megapoly.data.plan_png import draw_png
from megapoly.data.plan_report import describe, parse_range, samples, summary
from megapoly.data.realised import config_of, describe_shares, read_steps, share_report
from megapoly.errors import ConfigError, exit_on_error
from megapoly.pictures import checked_png

SYNOPSIS = "usage: tools/curriculum.py {CONFIG | --run RUN} [--json] [--samples A:B] [--png FILE] [--flag value ..]"
USAGE = (
    f"{SYNOPSIS}\n\n"
    "  CONFIG         a YAML file or the name of a preset\n"
    "  --run RUN      the folder of a run: what it has read and learnt by language, beside its plan\n"
    "  --json         all of it as one JSON object instead of tables and picture\n"
    "  --samples A:B  samples A to B (B excluded, counted from 0) as JSON lines instead\n"
    "  --png FILE     the shares by language over the tokens as a picture too, of a run with its losses\n"
)


@exit_on_error
def main(argv: list[str]) -> None:
    # A reader that closes early, as `| head` does, ends the listing quietly.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if {"-h", "--help"} & set(argv):
        print(help_text(USAGE))
        return
    flags, words = parse_flags(argv)
    if "--samples" in words[:-1]:  # argparse would take -5:3 for an option
        at = words.index("--samples")
        words[at : at + 2] = ["=".join(words[at : at + 2])]
    parser = ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--config", action="append", default=[])
    for name in ("--run", "--samples"):
        parser.add_argument(name)
    parser.add_argument("--png", type=checked_png)
    options, rest = parser.parse_known_args(words)
    known = ("run", "json", "samples", "png", "config")
    refuse_unknown([word for word in rest if word.startswith("-")], known=known)
    configs = [*options.config, *rest, *([config_of(options.run)] if options.run else [])]
    if len(configs) != 1:
        given = f"{len(configs)} configs are given ({', '.join(configs)}); give one"
        raise ConfigError(given if configs else f"no config is given; {SYNOPSIS}")
    cfg = load_config(configs[0], flags)
    check_model(cfg.model)
    check_training(cfg)
    plan = plan_for(cfg, open_sources(cfg))
    check_stages(cfg, dp=1)
    steps = read_steps(Path(options.run) / "metrics.jsonl", plan) if options.run else None
    report = share_report(plan, steps, cfg.data.eod_mask_loss) if steps else summary(plan)
    if options.samples is not None:
        lines = samples(plan, *parse_range(options.samples, plan.num_samples))
        sys.stdout.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    elif options.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    elif steps:
        print(describe_shares(report))
    else:
        print(describe(plan), draw_text(plan, colours=sys.stdout.isatty()), sep="\n\n")
    if options.png is not None:
        draw_png(plan, options.png, steps)
        print(f"picture: {options.png}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
