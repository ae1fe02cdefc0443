"""Finds texts that look as if they held a secret or personal data, and has the rules for lines.

Says that something is there, never what it is. Keys and numbers are told from their look-alikes by
their form, and by their checksum if they have one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from nested_core.data.room_checks import RowChecks
from nested_core.data.rules.rule_table import FrameRules, Rule
from nested_core.records.dataset import Findings

_IBAN_COUNTRIES_AND_LENGTHS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 "
    "EG29 ES24 FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IS26 IT27 JO30 "
    "KW30 KZ20 LB28 LI21 LT20 LU20 LV21 MC27 MD24 ME22 MK19 MT31 NL18 NO15 PK24 PL28 PT25 QA29 "
    "RO24 RS22 SA24 SE24 SI19 SK24 SM27 TN24 TR26 UA29 VA22"
)
_IBAN_LENGTHS = {
    iban[:2]: int(iban[2:]) for iban in _IBAN_COUNTRIES_AND_LENGTHS.split()
}  # by country
# Beginnings of card numbers by issuer, and their lengths (ISO/IEC 7812); not the 13 digits that
# Visa once had, which article numbers (EAN) have: one of ten passes the check.
_CARD_NUMBER_PATTERN = re.compile(
    r"4(?:\d{15}|\d{18})|(?:5[1-5]|2[3-6])\d{14}|(?:222[1-9]|22[3-9]\d|27[01]\d|2720)\d{12}"
    r"|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}|(?:6011|64[4-9]\d|65\d\d|352[89]|35[3-8]\d)\d{12}"
)
IsMatch = Callable[[str], object]
_FILE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".js", ".css", ".py", ".html")


def _accept_any(value: str) -> bool:
    return True


def _has_lower_upper_and_digits(value: str) -> bool:
    """Tell if it has small letters, capitals and digits, as random keys have, not words."""
    return all(re.search(characters, value) for characters in ("[a-z]", "[A-Z]", "[0-9]"))


def _has_upper_and_lower_case(value: str) -> bool:
    return not value.islower() and not value.isupper()


def _is_password(value: str) -> bool:
    """Tell if an assigned value is one: letters and digits, no program text, no stand-in."""
    if re.search(r"[()\[\]{}<>$*%]|\.\.\.|(?i:example|your|xxx|changeme|placeholder)", value):
        return False
    return bool(re.search("[A-Za-z]", value) and re.search("[0-9]", value))


def _is_email_address(value: str) -> bool:
    return not value.startswith("git@") and not value.lower().endswith(_FILE_SUFFIXES)


def _is_phone_number(value: str) -> bool:
    digits = re.sub(r"\D", "", value)
    is_grouped = re.search(r"\d[ .()-]+\d", value) is not None
    return 8 <= len(digits) <= 15 and (is_grouped or len(digits) >= 10)


def _is_card_number(value: str) -> bool:
    """Return whether the issuer is known and the check digit is right (Luhn)."""
    digits = re.sub(r"\D", "", value)
    if _CARD_NUMBER_PATTERN.fullmatch(digits) is None:
        return False
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(int(digit) for digit in digits[-1::-2])) % 10 == 0


def _is_iban(value: str) -> bool:
    """Return whether the country's length and the two check digits are right (ISO 13616)."""
    account = value.replace(" ", "")
    length = _IBAN_LENGTHS.get(account[:2], 0)
    if not length or len(account) < length:
        return False
    account = account[:length]
    return int("".join(str(int(sign, 36)) for sign in account[4:] + account[:4])) % 97 == 1


@dataclass(frozen=True)
class SensitivePattern:
    """One thing to look for: a pattern, and a test of what matches (its last group, or all)."""

    name: str
    group: Literal["secret", "personal"]
    form: re.Pattern[str]
    is_match: IsMatch = _accept_any

    def occurs_in(self, text: str) -> bool:
        """Return whether the text holds one."""
        return any(self.is_match(match[match.lastindex or 0]) for match in self.form.finditer(text))


def _secret(name: str, form: str, is_match: IsMatch = _accept_any) -> SensitivePattern:
    return SensitivePattern(name, "secret", re.compile(form), is_match)


def _personal(name: str, form: str, is_match: IsMatch) -> SensitivePattern:
    return SensitivePattern(name, "personal", re.compile(form), is_match)


_ASSIGNED_SECRET_PATTERN = (
    r"(?i)(?<![a-z])(?:password|passwd|passphrase|pwd|secret[_-]?key|client[_-]?secret|api[_-]?key"
    r"|access[_-]?token|auth[_-]?token)[\"']?\s*(?::=|=>|[:=])\s*[\"']?([^\s\"',;]{8,})"
)
# Looked for at the beginning of a word only, where the first group is the whole word before a dot:
# a header may begin anywhere in that word, and a search from each place would be quadratic.
_JSON_WEB_TOKEN_PATTERN = r"(?<![\w-])(?=([\w-]{11,}+)\.eyJ[\w-]{8,}+\.[\w-]{8})"
_PHONE_NUMBER_PATTERN = (
    r"(?<![\w+.-])(?:\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,4}"
    r"|(?:\([2-9]\d\d\) ?|[2-9]\d\d[-.])[2-9]\d\d[-.]\d{4})(?![\w-]|\.\d)"
)
# By what must be in a text for any of them to match: one search of many texts at once.
_PATTERNS_BY_HINT: tuple[tuple[str, tuple[SensitivePattern, ...]], ...] = (
    (
        "-----BEGIN|AKIA|ASIA|gh[pousr]_|github_pat_|glpat-|xox[abeoprs]-|AIza|sk-|hf_|eyJ",
        (
            _secret("private key", r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"),
            _secret("AWS key", r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
            _secret("GitHub token", r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})\b"),
            _secret("GitLab token", r"\bglpat-([\w-]{20,})", _has_upper_and_lower_case),
            _secret("Slack token", r"\bxox[abeoprs]-([A-Za-z0-9-]{10,})", re.compile(r"\d").search),
            _secret("Google key", r"\bAIza[\w-]{35}(?![\w-])"),
            _secret("Anthropic key", r"\bsk-ant-([\w-]{20,})", _has_lower_upper_and_digits),
            _secret("OpenAI key", r"\bsk-(?!ant-)([\w-]{20,})", _has_lower_upper_and_digits),
            _secret("Hugging Face token", r"\bhf_([A-Za-z0-9]{30,})\b", _has_upper_and_lower_case),
            _secret("JSON web token", _JSON_WEB_TOKEN_PATTERN, re.compile(r"\beyJ[\w-]{8}").search),
        ),
    ),
    (
        "(?i)passw|passphrase|pwd|secret|api[_-]?key|token",
        (_secret("password", _ASSIGNED_SECRET_PATTERN, _is_password),),
    ),
    (
        "@",
        (
            _personal(
                "e-mail address",
                r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])",
                _is_email_address,
            ),
        ),
    ),
    (
        "[0-9][0-9 ().-]{6,}[0-9]",
        (
            _personal("phone number", _PHONE_NUMBER_PATTERN, _is_phone_number),
            _personal(
                "card number", r"(?<![\w.+-])(?:\d[ -]?){12,18}\d(?![\w-]|\.\d)", _is_card_number
            ),
            _personal(
                "IBAN", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", _is_iban
            ),
        ),
    ),
)
SENSITIVE_PATTERNS = tuple(pattern for _, patterns in _PATTERNS_BY_HINT for pattern in patterns)


def find_sensitive_pattern_bits(texts: pl.Series) -> pl.Series:
    """Return what each text holds, UInt32: bit n for SENSITIVE_PATTERNS[n]; 0 for null."""
    bits = np.zeros(len(texts), np.uint32)
    first = 0
    for hint, patterns in _PATTERNS_BY_HINT:
        where = texts.str.contains(hint).fill_null(value=False).arg_true()
        for index, text in zip(where.to_list(), texts.gather(where), strict=True):
            for bit, pattern in enumerate(patterns, start=first):
                if pattern.occurs_in(text):
                    bits[index] |= 1 << bit
        first += len(patterns)
    return pl.Series(bits)


def _make_sensitive_data_rule(pattern_index: int) -> Rule:
    """Make the rule for one kind of secret or personal data, once a file, without its value."""
    is_absent = pl.col("sensitive") // 2**pattern_index % 2 == 0
    name = SENSITIVE_PATTERNS[pattern_index].name
    if SENSITIVE_PATTERNS[pattern_index].group == "personal":
        message = f"what looks like personal data ({name}) in {{count}} lines: {{places}}"
        return Rule.warning("personal-data", is_absent, message, once=True)
    message = (
        f"what looks like a secret ({name}) in {{count}} lines: {{places}}; "
        "take it out, and change it where it is in use"
    )
    return Rule.warning("likely-secret", is_absent, message, once=True)


SENSITIVE_DATA_RULES = FrameRules(
    columns={"sensitive": pl.UInt32},
    rules=tuple(map(_make_sensitive_data_rule, range(len(SENSITIVE_PATTERNS)))),
)


def _find(texts: pl.Series) -> dict[str, pl.Series]:
    """Return the column `sensitive` for the texts of lines: bits of what each may hold."""
    return {"sensitive": find_sensitive_pattern_bits(texts)}


def _add_findings(frame: pl.DataFrame, findings: Findings) -> None:
    """Add the findings on the lines of a file."""
    SENSITIVE_DATA_RULES.add_findings(frame.filter(pl.col("sensitive") != 0), findings)


CHECKS = RowChecks(SENSITIVE_DATA_RULES.columns, _find, _add_findings)
