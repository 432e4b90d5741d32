#!/usr/bin/env python3
"""Continue prompts with a checkpoint."""

from megapoly.arguments import ArgumentParser
from megapoly.checkpoint.load import CheckpointReader
from megapoly.errors import ConfigError, TokenizerError, exit_on_error
from megapoly.generate.sample import generate, load_model
from megapoly.tokenizer.load import load_tokenizer


def one_line(text: str) -> str:
    """A text with its line breaks shown as a sign."""
    return text.replace("\n", "⏎")


@exit_on_error
def main() -> None:
    """Read the flags, load the model on this process, print a continuation of each prompt."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--load", required=True, help="a run, its checkpoints/ or a step folder")
    parser.add_argument("--prompt", nargs="+", required=True, help="beginnings of texts")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for name, value, least in (
        ("temperature", args.temperature, 0),
        ("top-k", args.top_k, 1),
        ("max-new-tokens", args.max_new_tokens, 1),
    ):
        if not least <= value < 1e9:
            raise ConfigError(f"--{name} ({value}) must be a number of at least {least}")
    if not 0 <= args.seed < 2**63 or any("\udc80" <= char <= "\udcff" for char in "".join(args.prompt)):
        raise ConfigError(f"--seed ({args.seed}) must lie in [0, 2^63), and prompts must be UTF-8")
    reader = CheckpointReader.open(args.load)
    if reader.tokenizer_path is None:
        raise TokenizerError(f"{reader.folder}: holds no tokenizer (tokenizer.model or tokenizer.json)")
    tokenizer = load_tokenizer(reader.config.tokenizer.tokenizer_type, str(reader.tokenizer_path))
    model = load_model(reader)
    for prompt in args.prompt:
        ids = generate(
            model, tokenizer.encode(prompt), args.max_new_tokens,
            eod=tokenizer.eod, temperature=args.temperature, top_k=args.top_k, seed=args.seed,
        )  # fmt: skip
        print(f"{prompt} | {one_line(tokenizer.decode(ids))}")


if __name__ == "__main__":
    main()
