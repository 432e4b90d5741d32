"""JSONL to Megatron-LM's .bin/.idx: python tools/preprocess_data.py --input A.jsonl --output-prefix data/a .."""

import argparse

from megapoly.arguments import ArgumentParser
from megapoly.data.preprocess import preprocess
from megapoly.errors import exit_on_error
from megapoly.tokenizer.load import TOKENIZER_TYPES


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Encode JSONL files into PREFIX_text_document.bin/.idx.")
    parser.add_argument("--input", nargs="+", required=True, help="JSONL files, plain, .gz or .zst")
    parser.add_argument("--output-prefix", required=True, help="PREFIX of PREFIX_text_document.bin/.idx")
    parser.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    parser.add_argument("--tokenizer-model", required=True, help=".model, tokenizer.json or its directory")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--workers", type=int, default=1, help="processes that encode (1: no further process)")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys with text; one output for each")
    parser.add_argument("--on-bad-line", choices=("error", "skip"), default="error", help="skip counts and reports")
    parser.add_argument("--valid-fraction", type=float, default=0.0, help="part held out into PREFIX_valid_..")
    parser.add_argument("--log-interval", type=int, default=10000, help="documents between progress lines")
    return parser.parse_args()


@exit_on_error
def main() -> None:
    arguments = parse_arguments()
    summary = preprocess(
        arguments.input,
        arguments.output_prefix,
        arguments.tokenizer_type,
        arguments.tokenizer_model,
        append_eod=arguments.append_eod,
        workers=arguments.workers,
        json_keys=arguments.json_keys,
        on_bad_line=arguments.on_bad_line,
        valid_fraction=arguments.valid_fraction,
        log_interval=arguments.log_interval,
    )
    print(summary)


if __name__ == "__main__":
    main()
