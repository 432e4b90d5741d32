"""Text to Megatron-LM's .bin/.idx: python tools/preprocess_data.py --input A.jsonl --output-prefix data/a .."""

import argparse

from megapoly.arguments import ArgumentParser
from megapoly.data.preprocess import preprocess
from megapoly.data.templates import Template
from megapoly.errors import exit_on_error
from megapoly.tokenizer.batch import BACKENDS
from megapoly.tokenizer.load import TOKENIZER_TYPES

# Names under which Megatron-LM gives the same ids.
ALIASES = {"GPTSentencePieceTokenizer": "SentencePieceTokenizer"}


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Encode JSONL and Parquet files into PREFIX_text_document.bin/.idx.")
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files and patterns: JSONL (plain, .gz, .zst), .parquet")
    add("--output-prefix", required=True, help="PREFIX of PREFIX_text_document.bin/.idx")
    add("--tokenizer-type", required=True, choices=[*TOKENIZER_TYPES, *ALIASES])
    add("--tokenizer-model", required=True, help=".model, tokenizer.json or its directory")
    add("--tokenizer-backend", choices=BACKENDS, default="auto", help="auto: the fastest that gives equal ids")
    specials = parser.add_mutually_exclusive_group()
    specials.add_argument("--tokenizer-hf-include-special-tokens", action="store_true", help="as Megatron-LM's default")
    specials.add_argument("--tokenizer-hf-no-include-special-tokens", action="store_true", help="the default here")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--workers", type=int, default=1, help="processes that encode (1: no further process)")
    add("--partitions", type=int, default=1, help="taken for Megatron-LM's sake: the output does not depend on it")
    add("--keep-sequential-samples", action="store_true", help="likewise: the order is always that of the input")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--json-keys", nargs="+", default=["text"], help="keys (columns) with text; one output for each")
    texts.add_argument(
        "--template", nargs="+", default=[], metavar="NAME=TEXT", help=r"join fields: 'en-ko={en}\n{ko}'"
    )
    add("--language-key", default="lang", help="key (column) of the language, for the summary")
    add("--on-bad-line", choices=("error", "skip"), default="error", help="skip counts and reports")
    add("--valid-fraction", type=float, default=0.0, help="part held out into PREFIX_valid_.., by hash of the id")
    add("--shuffle-seed", type=int, help="shuffle all documents; without it they keep the order of the input")
    add("--pack-length", type=int, metavar="L", help="pack whole documents into rows for samples of L tokens, shuffled")
    add("--max-line-mib", type=int, default=32, help="a longer line is a bad line; bounds memory")
    add("--max-expansion", type=float, default=200.0, help="most bytes of text for a byte of a compressed file")
    add("--restart", action="store_true", help="do not go on with an interrupted run")
    add("--log-interval", type=int, default=10000, help="documents between progress lines where no terminal is")
    return parser.parse_args()


@exit_on_error
def main() -> None:
    arguments = parse_arguments()
    summary = preprocess(
        arguments.input,
        arguments.output_prefix,
        ALIASES.get(arguments.tokenizer_type, arguments.tokenizer_type),
        arguments.tokenizer_model,
        append_eod=arguments.append_eod,
        include_special_tokens=arguments.tokenizer_hf_include_special_tokens,
        workers=arguments.workers,
        json_keys=arguments.json_keys,
        templates=[Template.parse(given) for given in arguments.template],
        language_key=arguments.language_key,
        on_bad_line=arguments.on_bad_line,
        valid_fraction=arguments.valid_fraction,
        shuffle_seed=arguments.shuffle_seed,
        pack_length=arguments.pack_length,
        tokenizer_backend=arguments.tokenizer_backend,
        max_line_bytes=arguments.max_line_mib << 20,
        max_expansion=arguments.max_expansion,
        restart=arguments.restart,
        log_interval=arguments.log_interval,
        bar=True,
    )
    print("\n".join(summary.table()))
    print(f"{summary} ({summary.backend})")


if __name__ == "__main__":
    main()
