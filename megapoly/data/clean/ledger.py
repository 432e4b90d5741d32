"""What cleaning counts: documents and bytes by language, kept and removed by rule, what was mended; and samples."""

import hashlib
import heapq
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megapoly.data.clean.quality import Verdict
from megapoly.data.documents import UNKNOWN_LANGUAGE
from megapoly.data.summary import MOST_LANGUAGES

SAMPLE_CHARACTERS = 1000


@dataclass
class Amount:
    """Documents and bytes of their text."""

    documents: int = 0
    bytes: int = 0

    def add(self, documents: int, size: int) -> None:
        """Count more."""
        self.documents += documents
        self.bytes += size


@dataclass
class Tally:
    """What became of the documents of one language; `mended` counts documents that something was done to, by what."""

    read: Amount = field(default_factory=Amount)
    kept: Amount = field(default_factory=Amount)
    removed: dict[str, Amount] = field(default_factory=dict)
    mended: Counter[str] = field(default_factory=Counter)
    bad_lines: Counter[str] = field(default_factory=Counter)


class Ledger:
    """Counts by language and the samples of what was removed: of each rule and language the `most` of least hash.

    Which samples these are depends on neither the number of tasks nor their order.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.languages: dict[str, Tally] = {}
        self._samples: dict[tuple[str, str], list[tuple[int, str]]] = {}

    def of(self, language: str) -> Tally:
        """The tally of a language; past MOST_LANGUAGES a new one counts as undetermined."""
        return self.languages.setdefault(self._name(language), Tally())

    def _name(self, language: str) -> str:
        known = language in self.languages or len(self.languages) < MOST_LANGUAGES
        return language if known else UNKNOWN_LANGUAGE

    def remove(self, language: str, verdict: Verdict, text: str, facts: dict[str, Any]) -> None:
        """Count a document that goes, and perhaps keep it as a sample; `facts` is what else is known of it."""
        encoded, language = text.encode(), self._name(language)
        self.of(language).removed.setdefault(verdict.rule, Amount()).add(1, len(encoded))
        if not self.most:
            return
        key = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")
        held = self._samples.setdefault((verdict.rule, language), [])
        if len(held) < self.most or -held[0][0] > key:
            record = {"rule": verdict.rule, "detail": verdict.detail, "lang": language, **facts,
                      "characters": len(text), "text": text[:SAMPLE_CHARACTERS]}  # fmt: skip
            self._hold(held, key, json.dumps(record))

    def _hold(self, held: list[tuple[int, str]], key: int, record: str) -> None:
        if (-key, record) not in held:
            (heapq.heappush if len(held) < self.most else heapq.heappushpop)(held, (-key, record))

    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """Samples by rule, sorted by language and hash."""
        found: dict[str, list[dict[str, Any]]] = {}
        for (rule, _), held in sorted(self._samples.items()):
            found.setdefault(rule, []).extend(json.loads(record) for _, record in sorted(held, reverse=True))
        return found

    def save(self, path: Path) -> None:
        """Write it as one file that appears whole or not at all."""
        samples = [[*key, sorted(held)] for key, held in sorted(self._samples.items())]
        tree = {"languages": {name: _plain(tally) for name, tally in self.languages.items()}, "samples": samples}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(tree), encoding="utf-8")
        os.replace(temporary, path)

    def merge(self, path: Path) -> None:
        """Add what another ledger has saved."""
        tree = json.loads(path.read_text(encoding="utf-8"))
        for name, plain in tree["languages"].items():
            tally = self.of(name)
            tally.read.add(*plain["read"])
            tally.kept.add(*plain["kept"])
            for rule, amount in plain["removed"].items():
                tally.removed.setdefault(rule, Amount()).add(*amount)
            tally.mended.update(plain["mended"])
            tally.bad_lines.update(plain["bad_lines"])
        for rule, language, records in tree["samples"]:
            held = self._samples.setdefault((rule, language), [])
            for negative, record in records:
                self._hold(held, -negative, record)


def _plain(tally: Tally) -> dict[str, Any]:
    return {
        "read": [tally.read.documents, tally.read.bytes],
        "kept": [tally.kept.documents, tally.kept.bytes],
        "removed": {rule: [amount.documents, amount.bytes] for rule, amount in tally.removed.items()},
        "mended": dict(tally.mended),
        "bad_lines": dict(tally.bad_lines),
    }
