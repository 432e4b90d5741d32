"""Real text, where some is at hand (MEGAPOLY_CORPUS): prose of every language survives cleaning, with all its digits."""

import gzip
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from megapoly.data.clean.cleaner import Cleaner
from megapoly.data.clean.settings import load_settings
from megapoly.data.corpus import LANGUAGES

FOLDER = os.environ.get("MEGAPOLY_CORPUS", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="MEGAPOLY_CORPUS does not name a folder of real text")
PROSE = ("fastapi", "ms-azd", "ms-edgeai", "ms-iot", "ms-sec101", "udhr", "hesenti", "wisesight")
CLEAN = Cleaner(load_settings())


@pytest.mark.parametrize("language", LANGUAGES)
def test_prose_survives_with_its_digits_lines_and_language(language: str) -> None:
    with gzip.open(Path(FOLDER) / f"{language}.jsonl.gz", "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    chosen = random.Random(0).sample([d for d in found if d["source"] in PROSE], 60)
    kept = 0
    for document in chosen:
        outcome = CLEAN(document["text"], language)
        unnamed = CLEAN(document["text"], "und")
        if outcome.verdict is None:
            kept += 1
            assert outcome.language == language and (unnamed.language == language or unnamed.verdict)
            if not set(outcome.mended) & {"phone", "lines that are one address", "lines with an endless word"}:
                assert re.findall(r"\d+", outcome.text) == re.findall(r"\d+", document["text"])
            assert [line.strip() for line in outcome.text.split("\n") if line.strip()][:1]
            again = CLEAN(outcome.text, language)
            assert (again.text, again.verdict) == (outcome.text, None)
    assert kept >= 52, Counter(CLEAN(d["text"], language).verdict for d in chosen).most_common(5)
