"""Text to all that a small run needs: python tools/prepare_corpus.py --input A.jsonl B.jsonl --output-dir data/mine"""

import argparse

from megapoly.arguments import ArgumentParser
from megapoly.data.corpus import LANGUAGES, prepare_corpus
from megapoly.errors import exit_on_error


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Train a tokenizer on JSONL files, encode them, write a config.")
    parser.add_argument(
        "--input", nargs="+", required=True, help="JSONL or Parquet files: text and, if known, lang, id"
    )
    parser.add_argument("--output-dir", required=True, help="where tokenizer.model, the token files and config.yaml go")
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces; fewer where the text is too small")
    parser.add_argument("--valid-fraction", type=float, default=0.12, help="part of the documents that is held out")
    parser.add_argument("--languages", nargs="+", default=list(LANGUAGES), help="what text without lang may be")
    return parser.parse_args()


@exit_on_error
def main() -> None:
    arguments = parse_arguments()
    prepare_corpus(
        arguments.input,
        arguments.output_dir,
        vocab_size=arguments.vocab_size,
        valid_fraction=arguments.valid_fraction,
        languages=arguments.languages,
    )


if __name__ == "__main__":
    main()
