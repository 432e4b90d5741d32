"""Shingles and signatures: what they compare, in which scripts, and how surely they find a near duplicate."""

import random
import unicodedata

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from megapoly.data.clean import minhash
from megapoly.data.clean.minhash import ALONE, IN_WORD, SEPARATOR, band_hashes, batches, odd_numbers, shingles

ALPHABETS = [
    "abC",
    "éß",
    "жЖ",
    "한국어",
    "漢字简",
    "かなカ",
    "ไทยที่",
    "عربي",
    "שלום",
    "12٣",
    "ｆＦ",
    " \n\t",
    ".,!(){}_=",
    "\u200b🙂\U0010ffff",
    "हिन्दी",
]
TEXTS = st.lists(
    st.text(st.sampled_from("".join(ALPHABETS)), max_size=40) | st.text(max_size=12), min_size=1, max_size=8
)
WORDS = {
    "latin": [chr(97 + i) + chr(97 + j) + chr(97 + k) for i in range(26) for j in range(26) for k in range(3)],
    "hangul": [chr(0xAC00 + 28 * i) + chr(0xB098 + 7 * j) for i in range(40) for j in range(40)],
    "arabic": [chr(0x0627 + i) + chr(0x0628 + j) + chr(0x0631) for i in range(20) for j in range(15)],
    "code": [f"x{i}.f{i % 7}({i})" for i in range(900)],
}
CHARACTERS = {"han": [chr(0x4E00 + i) for i in range(2500)], "thai": [chr(0x0E01 + i) for i in range(46)]}


def tokens_of(text: str) -> list[str]:
    """The tokens as a slow reading of the rule gives them."""
    kinds, _ = minhash._tables()
    tokens, word = [], ""
    for character in text:
        folded = unicodedata.normalize("NFKC", character).casefold()
        plain = folded if len(folded) == 1 else character
        kind = kinds[ord(character)] if ord(character) < len(kinds) else SEPARATOR
        if word and kind != IN_WORD:
            tokens.append(word)
            word = ""
        if kind == ALONE:
            tokens.append(plain)
        elif kind == IN_WORD:
            word += plain
    return [*tokens, word] if word else tokens


def ngrams_of(text: str, n: int) -> list[tuple[str, ...]]:
    tokens = tokens_of(text)
    if 0 < len(tokens) < n:
        return [tuple(tokens)]
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def document(chance: random.Random, script: str, size: int = 300) -> list[str]:
    return chance.choices(WORDS.get(script) or CHARACTERS[script], k=size)


def text_of(tokens: list[str], script: str) -> str:
    return (" " if script in WORDS else "").join(tokens)


def share_a_band(first: str, second: str, **given: int) -> bool:
    chosen = {"ngram": 5, "bands": 14, "rows": 8, "seed": 1} | given
    hashes, have = band_hashes([first, second], **chosen)
    assert have.all()
    return bool((hashes[0] == hashes[1]).any())


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(1, 6))
def test_shingles_are_the_ngrams_of_a_slow_reading(texts: list[str], n: int) -> None:
    hashes, counts = shingles(texts, n)
    expected = [ngrams_of(text, n) for text in texts]
    assert counts.tolist() == [len(ngrams) for ngrams in expected]
    flat = [ngram for ngrams in expected for ngram in ngrams]
    assert len(hashes) == len(flat)
    # Equal n-grams have one hash, different ones two.
    assert len(set(zip(flat, hashes.tolist(), strict=True))) == len(set(flat)) == len(set(hashes.tolist()))


@settings(max_examples=50, deadline=None)
@given(TEXTS)
def test_a_signature_depends_on_its_text_alone(texts: list[str]) -> None:
    together, have = band_hashes(texts, 3, 4, 2, 7)
    for text, hashes, has in zip(texts, together, have, strict=True):
        alone, alone_has = band_hashes([text], 3, 4, 2, 7)
        assert has == alone_has[0] == bool(tokens_of(text))
        assert (hashes == alone[0]).all()


def test_every_character_is_of_the_kind_its_script_has() -> None:
    kinds, _ = minhash._tables()
    scripts = ["Hani", "Hira", "Kana", "Bopo", "Yiii", "Thai", "Laoo", "Khmr", "Mymr", "Tibt", "Tale", "Talu", "Lana"]
    by_character = regex.compile("[" + "".join(rf"\p{{scx={script}}}" for script in scripts) + "]")
    of_all = [*range(0x2BC, 0x332), *range(0x1D360, 0x1D372)]  # accents and counting rods, which these scripts use too
    by_word = regex.compile(r"[\p{Latin}\p{Cyrillic}\p{Greek}\p{Hangul}\p{Arabic}\p{Hebrew}\p{Devanagari}\p{Bengali}\p{Armenian}\p{Ethiopic}]")  # fmt: skip
    wrong = []
    for code in range(minhash.CODE_POINTS):
        character, kind = chr(code), kinds[code]
        if unicodedata.category(character)[0] not in "LMN":
            expected = SEPARATOR
        elif by_word.match(character):
            expected = IN_WORD
        elif by_character.match(character) and code not in of_all:
            expected = ALONE
        else:
            continue
        if kind != expected:
            wrong.append(f"{code:x}")
    assert not wrong


def test_a_number_belongs_to_one_character_in_all_its_forms() -> None:
    _, values = minhash._tables()
    forms: dict[str, int] = {}
    for code in range(minhash.CODE_POINTS):
        folded = unicodedata.normalize("NFKC", chr(code)).casefold()
        plain = folded if len(folded) == 1 else chr(code)
        assert forms.setdefault(plain, values[code]) == values[code]
    assert len(set(forms.values())) == len(forms)


def test_case_width_punctuation_and_space_do_not_count() -> None:
    plain = "the quick brown fox jumps over the lazy dog 123 times"
    changed = "  The QUICK, brown\nfox -- jumps; ｏｖｅｒ the “lazy” dog １２３ times!"
    assert (shingles([plain], 5)[0] == shingles([changed], 5)[0]).all()
    assert (shingles(["東京へ行く"], 2)[0] == shingles(["「東京」へ、行く。"], 2)[0]).all()


def test_a_long_text_is_the_same_but_for_its_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = text_of(document(random.Random(1), "latin", 5000), "latin")
    whole = set(shingles([text], 5)[0].tolist())
    monkeypatch.setattr(minhash, "BATCH", 1000)
    cut, counts = shingles(["first", text, "", text, "last"], 5)
    pieces = np.split(cut, np.cumsum(counts)[:-1])
    assert counts[0] == counts[4] == 1 and counts[2] == 0
    assert (pieces[1] == pieces[3]).all(), "where it is cut depends on the text alone"
    cuts = len(text) // 1000
    assert len(whole - set(pieces[1].tolist())) <= 5 * cuts < len(whole) / 20
    assert 0 <= counts[1] - len(text.split()) + 4 <= cuts
    characters = "".join(document(random.Random(1), "han", 5000))
    cut, _ = shingles([characters], 5)
    monkeypatch.undo()
    assert (cut == shingles([characters], 5)[0]).all(), "where a token is a character a cut changes nothing"


def test_batches_hold_every_text_once_in_order() -> None:
    texts = ["x" * (i * 7919 % 30_000) for i in range(60)] + [""] * 100_000 + ["y" * 200_000]
    lists = list(batches(texts))
    assert [text for batch in lists for text in batch] == texts
    for batch in lists:
        assert sum(len(text) + 1 for text in batch[:-1]) < minhash.BATCH


@pytest.mark.parametrize("similarity", [0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_detection_follows_the_similarity(similarity: float) -> None:
    # Words in no order that any two pairs share; n-grams of one word make the similarity what was wanted.
    size, pairs = 200, 1500
    common = round(2 * size * similarity / (1 + similarity))
    union = 2 * size - common
    texts = []
    for pair in range(pairs):
        numbers = [f"{pair}x{i}" for i in range(union)]
        texts += [" ".join(numbers[:size]), " ".join(numbers[-size:])]
    hashes, _ = band_hashes(texts, 1, 14, 8, 1)
    chance = 1 - (1 - (common / union) ** 8) ** 14
    found = int((hashes[0::2] == hashes[1::2]).any(axis=1).sum())
    assert abs(found - pairs * chance) <= 3.5 * (pairs * chance * (1 - chance)) ** 0.5 + 0.5


@pytest.mark.parametrize("script", ["latin", "han"])
def test_detection_follows_edits(script: str) -> None:
    chance = random.Random(5)
    chances: list[float] = []
    found = 0
    for trial in range(300):
        tokens = document(chance, script)
        changed = list(tokens)
        for place in chance.sample(range(len(tokens)), chance.randint(4, 20)):
            changed[place] = chance.choice(WORDS.get(script) or CHARACTERS[script])
        first, second = text_of(tokens, script), text_of(changed, script)
        a, b = set(ngrams_of(first, 5)), set(ngrams_of(second, 5))
        chances.append(1 - (1 - (len(a & b) / len(a | b)) ** 8) ** 14)
        found += share_a_band(first, second, seed=trial)
    assert 75 < sum(chances) < 225
    assert abs(found - sum(chances)) <= 3.5 * sum(p * (1 - p) for p in chances) ** 0.5


def test_more_bands_find_more_and_more_rows_less() -> None:
    chance = random.Random(3)
    pairs = []
    for _ in range(150):
        tokens = document(chance, "latin")
        edited = list(tokens)
        for place in chance.sample(range(300), 12):
            edited[place] = "new"
        pairs.append((" ".join(tokens), " ".join(edited)))

    def share(**given: int) -> int:
        return sum(share_a_band(a, b, **given) for a, b in pairs)

    assert share(bands=1) < share(bands=14) < share(bands=60)
    assert share(rows=2) > share(rows=8) > share(rows=20)


def test_unrelated_texts_share_no_band() -> None:
    chance = random.Random(11)
    scripts = [*WORDS, *CHARACTERS]
    texts = [text_of(document(chance, scripts[i % 6], chance.randint(5, 80)), scripts[i % 6]) for i in range(12_000)]
    hashes, _ = band_hashes(texts, 5, 14, 8, 1)
    assert [len(np.unique(band)) for band in hashes.T] == [len(texts)] * 14


def test_hundreds_of_thousands_of_ngrams_have_as_many_hashes() -> None:
    # 31 bits would let dozens of them meet; numbers, repeated letters and permutations are the hardest words.
    letters = "abcdefghijklmno"
    words = [*map(str, range(300_000)), *("a" * i for i in range(16, 250))]
    words += [a + b + c + d for a in letters for b in letters for c in letters for d in letters]
    texts = [" ".join(words[i : i + 2000]) for i in range(0, len(words), 2000)]
    assert max(map(len, texts)) < minhash.BATCH, "no word is cut"
    for ngram in (1, 5):
        hashes, counts = shingles(texts, ngram)
        assert len(np.unique(hashes)) == counts.sum() == len(words) - (ngram - 1) * len(texts)


def test_factors_are_odd_wide_and_different() -> None:
    # Odd ones lose nothing, and only factors wider than the rows they meet keep sums of few rows apart.
    factors = odd_numbers(64).tolist()
    assert len(set(factors)) == 64
    assert all(factor % 2 == 1 and factor >> 54 for factor in factors)
    assert odd_numbers(5).tolist() == factors[:5], "an n-gram's factors do not change with n"


LONG = {
    "ko": "대한민국의 수도는 서울이며 한강이 도시를 가로질러 흐른다. 오래된 궁궐과 높은 건물이 함께 있는 이 도시에는 많은 사람이 산다. ",
    "zh": "北京是中华人民共和国的首都，位于华北平原的北部，是全国的政治和文化中心，拥有三千多年的建城历史。",
    "th": "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทย เป็นศูนย์กลางการปกครองการศึกษาและการคมนาคม",
    "ar": "القاهرة هي عاصمة جمهورية مصر العربية وأكبر مدنها من حيث عدد السكان والمساحة وتقع على ضفاف نهر النيل. ",
    "code": "def area(width, height):\n    if width < 0 or height < 0:\n        raise ValueError('negative')\n    return width * height\n",
}


@pytest.mark.parametrize("language", LONG)
def test_a_small_edit_is_found_in_every_script(language: str) -> None:
    chance = random.Random(language)
    # Pieces in a random order, so that a long text has many n-grams of its own.
    parts = regex.findall(r"\S{1,2}\s*", LONG[language])
    tokens = [chance.choice(parts) + (" " if language in ("ko", "ar", "code") else "") for _ in range(800)]
    text, other = "".join(tokens), "".join(chance.sample(tokens, len(tokens)))
    edited = "".join([*tokens[:400], " 42 ", *tokens[400:]])
    assert text != edited and share_a_band(text, edited)
    assert not share_a_band(text, other)


def test_a_seed_decides_the_signature() -> None:
    text = text_of(document(random.Random(1), "latin"), "latin")
    one, again, other = (band_hashes([text], 5, 14, 8, seed)[0] for seed in (1, 1, 2))
    assert (one == again).all() and not (one == other).any()
    assert band_hashes([text], 5, 14, 8, 2**64 - 1)[0].shape == (1, 14)


def test_short_texts_are_compared_whole() -> None:
    texts = ["yes", "no", "yes no", "no yes", "Yes!", "네", "是", "是的", "", "!!!", "🙂", "???"]
    hashes, have = band_hashes(texts, 5, 14, 8, 1)
    assert have.tolist() == [True] * 8 + [False] * 4
    assert (hashes[0] == hashes[4]).all()
    assert len(np.unique(hashes[[0, 1, 2, 3, 5, 6, 7]])) == 7 * 14, "no two of these share a band"
