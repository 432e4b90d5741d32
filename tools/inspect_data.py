"""A look into .bin/.idx pairs: python tools/inspect_data.py PREFIX .. [--tokenizer-type T --tokenizer-model M] .."""

import argparse
import json
from functools import partial

from megapoly.arguments import ArgumentParser
from megapoly.data.corpus import LanguageIdentifier
from megapoly.data.indexed import token_dtype
from megapoly.data.inspection import describe, identified_shares, inspect, pairs_of, samples, shown
from megapoly.data.mending import repair
from megapoly.errors import ConfigError, exit_on_error
from megapoly.tokenizer.load import TOKENIZER_TYPES, Tokenizer, load_tokenizer


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Check pairs of .bin/.idx as a whole and show what they hold.")
    add = parser.add_argument
    add("paths", nargs="+", help="prefixes of pairs, or folders: all their pairs")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, help="with it: text, and ids checked against its vocabulary")
    add("--tokenizer-model", help=".model, tokenizer.json or its directory")
    add("--samples", type=int, default=5, help="documents whose text is shown")
    add("--languages", nargs="+", metavar="CODE", help="identify these languages in documents drawn, print shares")
    add("--identify", type=int, default=1000, help="documents drawn for that")
    add("--frequent", type=int, default=10, help="frequent tokens that are shown")
    add("--max-tokens", type=int, help="read at most so many tokens of a pair, spread evenly (default: all)")
    add("--seed", type=int, default=1234, help="draws documents")
    add("--json", action="store_true", help="one JSON object a pair")
    add("--repair", action="store_true", help="first cut off what follows the last whole document, in place")
    return parser.parse_args()


def look(prefix: str, arguments: argparse.Namespace, tokenizer: Tokenizer | None) -> None:
    """Inspect a pair and print it."""
    found = inspect(prefix, None if tokenizer is None else tokenizer.vocab_size, arguments.max_tokens)
    texts, shares = [], {}
    if tokenizer is not None:
        texts = samples(prefix, tokenizer, arguments.samples, arguments.seed)
        if arguments.languages:
            identify = LanguageIdentifier(arguments.languages)
            shares = identified_shares(prefix, tokenizer, identify, arguments.identify, arguments.seed)
    if arguments.json:
        more = {"samples": [{"document": i, "text": text} for i, text in texts], "identified_shares": shares}
        print(json.dumps(found.to_json(tokenizer, arguments.frequent) | more, ensure_ascii=False))
        return
    print(describe(found, tokenizer, arguments.frequent))
    if shares:
        print("  languages  " + ", ".join(f"{language} {share:.1%}" for language, share in shares.items()))
    for i, text in texts:
        print(f"  document {i:,}: {shown(text)}")


@exit_on_error
def main() -> None:
    arguments = parse_arguments()
    if (arguments.tokenizer_type is None) != (arguments.tokenizer_model is None):
        raise ConfigError("--tokenizer-type and --tokenizer-model belong together: give both or neither")
    if arguments.languages and arguments.tokenizer_type is None:
        raise ConfigError("--languages needs text: give --tokenizer-type and --tokenizer-model")
    for name in ("samples", "identify", "frequent", "max_tokens"):
        if (getattr(arguments, name) or 0) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} ({getattr(arguments, name)}) must not be negative")
    tokenizer, mend = None, repair
    if arguments.tokenizer_type is not None:
        tokenizer = load_tokenizer(arguments.tokenizer_type, arguments.tokenizer_model)
        mend = partial(repair, dtype=token_dtype(tokenizer.vocab_size), eod=tokenizer.eod)
    for prefix in pairs_of(arguments.paths):
        if arguments.repair:
            left = mend(prefix)
            what = f"{left.documents:,} documents, {left.tokens:,} tokens; {left.cut_bytes:,} bytes cut off"
            print(f"{prefix}: mended: {what}" if not arguments.json else json.dumps({"mended": vars(left)}))
        look(prefix, arguments, tokenizer)


if __name__ == "__main__":
    main()
