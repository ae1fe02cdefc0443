"""Texts -> which of them look as if they held a secret or somebody's personal data, by kind.

Says that something is there, never what it is. A kind is told from its look-alikes by its own form,
and where it has one by its checksum.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

_IBAN_LENGTHS = {
    **{"AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22},
    **{"BR": 29, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20},
    **{"EG": 29, "ES": 24, "FI": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18},
    **{"GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IS": 26, "IT": 27, "JO": 30},
    **{"KW": 30, "KZ": 20, "LB": 28, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MD": 24},
    **{"ME": 22, "MK": 19, "MT": 31, "NL": 18, "NO": 15, "PK": 24, "PL": 28, "PT": 25, "QA": 29},
    **{"RO": 24, "RS": 22, "SA": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TN": 24, "TR": 26},
    **{"UA": 29, "VA": 22},
}
# Beginnings of card numbers by issuer, and their lengths (ISO/IEC 7812).
_CARD = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|2[3-6])\d{14}|(?:222[1-9]|22[3-9]\d|27[01]\d|2720)\d{12}"
    r"|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}|(?:6011|64[4-9]\d|65\d\d|352[89]|35[3-8]\d)\d{12}"
)
_FILES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".js", ".css", ".py", ".html")


def _always(found: str) -> bool:
    return True


def _is_mixed(found: str) -> bool:
    """Whether it has small letters, capitals and digits, as random keys have and words have not."""
    return all(re.search(kind, found) for kind in ("[a-z]", "[A-Z]", "[0-9]"))


def _is_cased(found: str) -> bool:
    return not found.islower() and not found.isupper()


def _is_password(found: str) -> bool:
    """Whether a value that is assigned is one: letters and digits, no program text, no stand-in."""
    if re.search(r"[()\[\]{}<>$*%]|\.\.\.|(?i:example|your|xxx|changeme|placeholder)", found):
        return False
    return bool(re.search("[A-Za-z]", found) and re.search("[0-9]", found))


def _is_address(found: str) -> bool:
    return not found.startswith("git@") and not found.lower().endswith(_FILES)


def _is_phone(found: str) -> bool:
    digits = re.sub(r"\D", "", found)
    is_grouped = re.search(r"\d[ .()-]+\d", found) is not None
    return 8 <= len(digits) <= 15 and (is_grouped or len(digits) >= 10)


def _is_card(found: str) -> bool:
    """Whether the issuer is known and the check digit is right (Luhn)."""
    digits = re.sub(r"\D", "", found)
    if _CARD.fullmatch(digits) is None:
        return False
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(int(digit) for digit in digits[-1::-2])) % 10 == 0


def _is_iban(found: str) -> bool:
    """Whether the country's length and the two check digits are right (ISO 13616)."""
    account = found.replace(" ", "")
    length = _IBAN_LENGTHS.get(account[:2], 0)
    if not length or len(account) < length:
        return False
    account = account[:length]
    return int("".join(str(int(sign, 36)) for sign in account[4:] + account[:4])) % 97 == 1


@dataclass(frozen=True)
class Kind:
    """What is looked for: its form, and what a match must be besides (its last group, or all)."""

    name: str
    group: Literal["secret", "personal"]
    form: re.Pattern[str]
    is_one: Callable[[str], object] = _always

    def is_in(self, text: str) -> bool:
        """Whether the text holds one."""
        return any(self.is_one(match[match.lastindex or 0]) for match in self.form.finditer(text))


def _secret(name: str, form: str, is_one: Callable[[str], object] = _always) -> Kind:
    return Kind(name, "secret", re.compile(form), is_one)


def _personal(name: str, form: str, is_one: Callable[[str], object] = _always) -> Kind:
    return Kind(name, "personal", re.compile(form), is_one)


_ASSIGNED = (
    r"(?i)(?<![a-z])(?:password|passwd|passphrase|pwd|secret[_-]?key|client[_-]?secret|api[_-]?key"
    r"|access[_-]?token|auth[_-]?token)[\"']?\s*(?::=|=>|[:=])\s*[\"']?([^\s\"',;]{8,})"
)
# Looked for at the beginning of a word only, where the first group is the whole word before a dot:
# a header may begin anywhere in that word, and a search from each place would be quadratic.
_WEB_TOKEN = r"(?<![\w-])(?=([\w-]{11,}+)\.eyJ[\w-]{8,}+\.[\w-]{8})"
_PHONE = (
    r"(?<![\w+.-])(?:\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,4}"
    r"|(?:\([2-9]\d\d\) ?|[2-9]\d\d[-.])[2-9]\d\d[-.]\d{4})(?![\w-]|\.\d)"
)
# By what must be in a text for any of the kinds below it: one search of many texts at once.
_KINDS: tuple[tuple[str, tuple[Kind, ...]], ...] = (
    (
        "-----BEGIN|AKIA|ASIA|gh[pousr]_|github_pat_|glpat-|xox[abeoprs]-|AIza|sk-|hf_|eyJ",
        (
            _secret("private key", r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"),
            _secret("AWS key", r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
            _secret("GitHub token", r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})\b"),
            _secret("GitLab token", r"\bglpat-([\w-]{20,})", _is_cased),
            _secret("Slack token", r"\bxox[abeoprs]-([A-Za-z0-9-]{10,})", re.compile(r"\d").search),
            _secret("Google key", r"\bAIza[\w-]{35}(?![\w-])"),
            _secret("Anthropic key", r"\bsk-ant-([\w-]{20,})", _is_mixed),
            _secret("OpenAI key", r"\bsk-(?!ant-)([\w-]{20,})", _is_mixed),
            _secret("Hugging Face token", r"\bhf_([A-Za-z0-9]{30,})\b", _is_cased),
            _secret("JSON web token", _WEB_TOKEN, re.compile(r"\beyJ[\w-]{8}").search),
        ),
    ),
    (
        "(?i)passw|passphrase|pwd|secret|api[_-]?key|token",
        (_secret("password", _ASSIGNED, _is_password),),
    ),
    (
        "@",
        (
            _personal(
                "e-mail address",
                r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])",
                _is_address,
            ),
        ),
    ),
    (
        "[0-9][0-9 ().-]{6,}[0-9]",
        (
            _personal("phone number", _PHONE, _is_phone),
            _personal("card number", r"(?<![\w.+-])(?:\d[ -]?){12,18}\d(?![\w-]|\.\d)", _is_card),
            _personal(
                "IBAN",
                r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b",
                _is_iban,
            ),
        ),
    ),
)
KINDS = tuple(kind for _, kinds in _KINDS for kind in kinds)


def find_kinds(texts: pl.Series) -> pl.Series:
    """For each text the kinds that it holds, UInt32: bit n stands for KINDS[n]; null holds none."""
    found = np.zeros(len(texts), np.uint32)
    bit = 0
    for hint, kinds in _KINDS:
        where = texts.str.contains(hint).fill_null(value=False).arg_true()
        for index, text in zip(where.to_list(), texts.gather(where), strict=True):
            for place, kind in enumerate(kinds, start=bit):
                if kind.is_in(text):
                    found[index] |= 1 << place
        bit += len(kinds)
    return pl.Series(found)
