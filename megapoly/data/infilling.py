"""Fill-in-the-middle (Bavarian et al. 2022, arXiv 2207.14255): a document is cut in three, and its middle comes last.

Whether and where a document is cut is a pure function of the seed, the sample and the document's number in it, so
that no layout and no resume changes it. A sample keeps its length: the three tokens that mark the parts take the place
of the document's last three before its end.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megapoly.data.sampler import GOLDEN, WORD, mix
from megapoly.errors import ConfigError, TokenizerError
from megapoly.sections import DataConfig
from megapoly.tokenizer.load import Tokenizer

Token = TypeVar("Token", bound=np.integer)
MARKS = 3
DRAWS = 4  # of a document: is it cut, is it suffix first, and the two cuts


@dataclass(frozen=True)
class Infilling:
    """Which documents are cut: of source i the part rates[i], of these spm_rate with the suffix first.

    `eod`, `prefix`, `middle` and `suffix` are token ids.
    """

    eod: int
    prefix: int
    middle: int
    suffix: int
    rates: tuple[float, ...]
    spm_rate: float
    seed: int

    def apply(self, tokens_T: NDArray[Token], source: int, sample: int, sequence: int = 0) -> NDArray[Token]:
        """The tokens of a sample, or of one of its sequences, with the documents that are drawn cut.

        The result has the same length and type; it is the same array where the source is left as it is.
        """
        if not self.rates[source]:
            return tokens_T
        key = mix(mix(self.seed & WORD) ^ mix((sample + 1) * GOLDEN & WORD)) ^ mix(sequence * GOLDEN & WORD)
        result = tokens_T.copy()
        ends = [*np.flatnonzero(tokens_T == self.eod).tolist(), len(tokens_T)]
        begin = 0
        for number, end in enumerate(ends):
            is_cut, is_suffix_first, *cuts = (mix((key + (DRAWS * number + i) * GOLDEN) & WORD) for i in range(DRAWS))
            if end - begin > MARKS and is_cut < self.rates[source] * (WORD + 1):
                first, second = sorted(cut % (end - begin - MARKS + 1) for cut in cuts)
                document = tokens_T[begin : end - MARKS]
                parts = document[:first], document[first:second], document[second:]
                result[begin:end] = self._joined(*parts, is_suffix_first < self.spm_rate * (WORD + 1))
            begin = end + 1
        return result

    def _joined(
        self, before: NDArray[Token], between: NDArray[Token], after: NDArray[Token], is_suffix_first: bool
    ) -> NDArray[Token]:
        """Prefix, suffix, middle; or suffix, prefix, middle, in which the prefix follows the mark of the middle."""
        prefix, suffix, middle = np.array([[self.prefix], [self.suffix], [self.middle]], dtype=before.dtype)
        if is_suffix_first:
            return np.concatenate([prefix, suffix, after, middle, before, between])
        return np.concatenate([prefix, before, suffix, after, middle, between])


def make_infilling(data: DataConfig, tokenizer: Tokenizer, seed: int) -> Infilling | None:
    """What the configuration asks for, None where it asks for nothing.

    Raises ConfigError for a rate that is none, TokenizerError where the tokenizer lacks a mark.
    """
    rates = []
    for source in data.sources:
        default = data.fim_rate if source.kind == "code" else 0.0
        rate = default if source.fim_rate is None else source.fim_rate
        rates.append(_rate(rate, f"source '{source.name}': fim_rate"))
    _rate(data.fim_rate, "fim_rate")
    spm_rate = _rate(data.fim_spm_rate, "fim_spm_rate")
    if not any(rates):
        return None
    marks = {}
    for name in ("prefix", "middle", "suffix"):
        option = f"fim_{name}_token"
        token: str = getattr(data, option)
        found = tokenizer.token_id(token)
        if found is None:
            raise TokenizerError(
                f"{tokenizer.path}: has no token '{token}' for {option}, which fim_rate needs; "
                f"name its own by --{option.replace('_', '-')}, train one with --special-tokens '{token}', or set "
                "fim_rate to 0"
            )
        marks[name] = found
    return Infilling(tokenizer.eod, rates=tuple(rates), spm_rate=spm_rate, seed=seed, **marks)


def _rate(value: float, what: str) -> float:
    if not 0 <= value <= 1:
        raise ConfigError(f"{what} ({value}) must lie between 0 and 1")
    return value
