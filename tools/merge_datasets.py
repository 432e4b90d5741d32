"""Several .bin/.idx pairs as one: python tools/merge_datasets.py --input A B .. --output-prefix P"""

import argparse

from megapoly.arguments import ArgumentParser
from megapoly.data.inspection import pairs_of
from megapoly.data.mending import merge
from megapoly.errors import exit_on_error


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Write datasets one after the other as one, documents in their order.")
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="prefixes of pairs, or one folder: all its pairs, by name")
    add("--output-prefix", required=True, help="PREFIX of the merged PREFIX.bin/.idx")
    return parser.parse_args()


@exit_on_error
def main() -> None:
    arguments = parse_arguments()
    prefixes = pairs_of(arguments.input)
    documents, tokens = merge(prefixes, arguments.output_prefix)
    print(f"{arguments.output_prefix}: {len(prefixes)} datasets, {documents:,} documents, {tokens:,} tokens")


if __name__ == "__main__":
    main()
