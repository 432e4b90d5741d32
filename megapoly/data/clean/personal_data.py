"""Personal data in text, replaced by tokens: addresses of mail, telephones, resident numbers, cards, accounts, IP.

Patterns are strict: a number counts as one of these only by its form and, where it has them, by check digits and
dates. Dates, prices, versions, ISBN and addresses that name nobody (127.0.0.1, user@example.com) stay.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields

from megapoly.data.clean.settings import Tokens

_BEFORE = r"(?<![A-Za-z0-9_.,/#+@-])"
_AFTER = r"(?![A-Za-z0-9_]|[.,:/-][0-9])"
_EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9][\w.+%-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,8}([A-Za-z]{2,24})(?![\w@-])",
    re.ASCII,
)
# user@example.com is documentation (RFC 2606), icon@2x.png a file, git@host:path an address of code.
_NO_MAIL = frozenset(
    "png jpg jpeg gif svg webp css js ts py service timer socket conf local test example invalid".split()
)
_DOCUMENTED = re.compile(r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net|edu)|localhost|domain\.com)$", re.ASCII)
_DIGITS = re.compile(r"[0-9][0-9 .()+-]{5,}[0-9Xx]")
_NUMBER = re.compile(
    _BEFORE
    + r"""(?:
    (?P<resident>[0-9]{6}[ ]?[-–][ ]?[1-8][0-9]{6}|[0-9]{13})
  | (?P<citizen>[1-9][0-9]{16}[0-9Xx])
  | (?P<card>[3-6][0-9]{3}(?P<s>[ -]?)[0-9]{4}(?P=s)[0-9]{4}(?P=s)[0-9]{4}
      |3[47][0-9]{2}(?P<a>[ -]?)[0-9]{6}(?P=a)[0-9]{5})
  | (?P<ip>(?:[0-9]{1,3}\.){3}[0-9]{1,3})
  | (?P<phone>
      0(?P<k>[ ./-]?)10(?P=k)[0-9]{4}(?P=k)[0-9]{4}
      |01[016789](?P<m>[ .-]?)[0-9]{3,4}(?P=m)[0-9]{4}
      |\(0[0-9]{1,4}\)[ ]?[0-9]{2,4}[ -]?[0-9]{3,4}
      |0[0-9]{1,4}(?P<p>[ .-])[0-9]{2,4}(?:(?P=p)[0-9]{2,4}){1,3}
      |\([2-9][0-9]{2}\)[ ]?[0-9]{3}[ .-][0-9]{4}
      |[2-9][0-9]{2}(?P<u>[.-])[0-9]{3}(?P=u)[0-9]{4}
      |\([1-9][0-9]\)[ ]?9?[0-9]{4}-[0-9]{4}
      |1[3-9][0-9](?P<c>[ -])[0-9]{4}(?P=c)[0-9]{4})
  | (?P<mobile>1[3-9][0-9]{9})
    )"""
    + _AFTER,
    re.VERBOSE,
)
# {1,5}+: digits that are given back to be split otherwise would be split in every way.
# (?<!\|>), (?!\|>): what a token stands for held digits, over which nothing reached when they were there.
_ABROAD = re.compile(r"(?<![\w+])(?<!\|>)(?:\+|00)[1-9][0-9]{0,2}(?:[ .-]?\(?[0-9]{1,5}+\)?){1,6}" + _AFTER, re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-fA-F]{3}:[0-9a-fA-F:]{2,34}(?![\w:]|\.[0-9])")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?:[ ]?[A-Z0-9]{4}){2,7}(?:[ ]?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_BANK = re.compile(
    r"(?P<word>(?:계좌|은행|입금|예금주)(?:(?!\|>)[^\n0-9]){0,20})(?P<number>[0-9]{2,6}-[0-9]{2,6}-[0-9]{2,8}(?:-[0-9]{1,3})?)"
    + _AFTER
)
# What makes a number that follows something else than a person's.
_NO_PERSON = re.compile(
    r"(?:isbn|issn|doi|version|ver\.?|버전|版本|バージョン|rfc|[(\s]v)[\s:.=#-]*(?:1[03][\s:-]*)?$", re.IGNORECASE
)
_GUARD = 16
_SMALL = 30  # four numbers below it are a version or a section


class PersonalData:
    """Replaces personal data by the given tokens; counts what it found."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = {field.name: getattr(tokens, field.name) for field in fields(tokens)}

    def __call__(self, text: str, language: str, found: Counter[str]) -> str:
        """The text with tokens; `found` counts by kind."""
        if "@" in text:
            text = self._replace(_EMAIL, "email", text, found, _is_mail)
        if _DIGITS.search(text) is None and "::" not in text:
            return text
        if self._tokens["account"] is not None:
            text = self._replace(_IBAN, "account", text, found, lambda match: is_iban(match[0]))
            if "-" in text and language == "ko":
                text = _BANK.sub(lambda match: self._account(match, found), text)
        if "+" in text or "00" in text:
            text = self._replace(_ABROAD, "phone", text, found, _is_phone_abroad)
        text = _NUMBER.sub(lambda match: self._number(match, language, found), text)
        if ":" in text:
            text = self._replace(_IPV6, "ip", text, found, lambda match: _is_public(match[0]))
        return text

    def _replace(
        self,
        pattern: re.Pattern[str],
        kind: str,
        text: str,
        found: Counter[str],
        accepts: Callable[[re.Match[str]], bool],
    ) -> str:
        token = self._tokens[kind]
        if token is None:
            return text

        def instead(match: re.Match[str]) -> str:
            if not accepts(match):
                return match[0]
            found[kind] += 1
            return token

        return pattern.sub(instead, text)

    def _account(self, match: re.Match[str], found: Counter[str]) -> str:
        found["account"] += 1
        return f"{match['word']}{self._tokens['account']}"

    def _number(self, match: re.Match[str], language: str, found: Counter[str]) -> str:
        kind = _kind(match, language)
        token = self._tokens[kind] if kind else None
        if kind is None or token is None:
            return match[0]
        found[kind] += 1
        return token


def _kind(match: re.Match[str], language: str) -> str | None:
    number = match[0]
    before = match.string[max(0, match.start() - _GUARD) : match.start()]
    if _NO_PERSON.search(before):
        return None
    if match["resident"]:
        return "resident_number" if is_resident_number(number) else None
    if match["citizen"]:
        return "resident_number" if is_citizen_number(number) else None
    if match["card"]:
        return "card" if is_card(number) else None
    if match["ip"]:
        return "ip" if _is_public(number) else None
    if match["mobile"]:  # eleven digits alone: a telephone only where they are written so
        return "phone" if language == "zh" else None
    digits = sum(c.isdigit() for c in number)
    is_amount = match["p"] == " " and before[-1:] == " " and before[-2:-1].isdigit()  # 8 000 000 000
    return "phone" if not is_amount and 9 <= digits <= 11 and _is_phone(number, digits, language) else None


def _is_phone(number: str, digits: int, language: str) -> bool:
    if number.isdigit():  # 01012345678
        return language == "ko" and digits == 11
    return not re.fullmatch(r"0[0-9]([ .-])[0-9]{2}\1(?:19|20)[0-9]{2}", number)  # 01.02.2024 is a date


def _is_mail(match: re.Match[str]) -> bool:
    if match[1].lower() in _NO_MAIL or _DOCUMENTED.search(match[0].lower()):
        return False
    return not (match[0].startswith("git@") and match.string[match.end() : match.end() + 1] in ":/")


def _is_phone_abroad(match: re.Match[str]) -> bool:
    number = match[0]
    digits = sum(c.isdigit() for c in number) - 2 * number.startswith("00")
    if number.startswith("00"):  # a number in a table may begin so; a telephone is written in groups
        return 10 <= digits <= 14 and len(re.findall("[ .-]", number)) >= 2
    return 9 <= digits <= 15


def _digits(number: str) -> list[int]:
    return [int(c) for c in number if c.isdigit()]


def _is_date(year: int, month: int, day: int) -> bool:
    longest = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    is_leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    return 1 <= month <= 12 and 1 <= day <= longest[month - 1] and (is_leap or (month, day) != (2, 29))


def is_resident_number(number: str) -> bool:
    """A Korean resident number by its date of birth and, written without a hyphen, its check digit.

    Numbers given since October 2020 have no check digit, and thirteen digits alone may be anything.
    """
    d = _digits(number)
    year, month, day = 10 * d[0] + d[1], 10 * d[2] + d[3], 10 * d[4] + d[5]
    century = {1: 1900, 2: 1900, 5: 1900, 6: 1900, 3: 2000, 4: 2000, 7: 2000, 8: 2000}.get(d[6])
    if century is None or not _is_date(century + year, month, day):
        return False
    weights = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)
    check = 11 - sum(a * b for a, b in zip(d, weights, strict=False)) % 11
    return not number.isdigit() or d[12] == (check + 2 * (d[6] >= 5)) % 10  # foreigners' is 2 more


def is_citizen_number(number: str) -> bool:
    """A Chinese identity number by its date of birth and its check digit (ISO 7064, MOD 11-2)."""
    if not _is_date(int(number[6:10]), int(number[10:12]), int(number[12:14])):
        return False
    total = sum(int(c) * pow(2, 17 - i, 11) for i, c in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper() and 1900 <= int(number[6:10]) <= 2100


def is_card(number: str) -> bool:
    """A card by its length and Luhn's check digit."""
    d = _digits(number)
    doubled = (sum(divmod(2 * n, 10)) if i % 2 else n for i, n in enumerate(reversed(d)))
    return len(d) in (15, 16) and len(set(d)) > 1 and sum(doubled) % 10 == 0


def is_iban(number: str) -> bool:
    """An account by ISO 13616: the digits of all letters, remainder 1 of 97."""
    plain = number.replace(" ", "")
    if not 15 <= len(plain) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def _is_public(address: str) -> bool:
    """Whether an address may name somebody: no private or reserved one, and no version number."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (
        found.is_global
        and not found.is_multicast
        and (found.version == 6 or any(octet >= _SMALL for octet in _octets(address)))
    )


def _octets(address: str) -> Iterator[int]:
    return (int(octet) for octet in address.split("."))
