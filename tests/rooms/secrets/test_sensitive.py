"""Likely secrets and personal data: found by their form, told from look-alikes, never shown."""

from __future__ import annotations

import json
import time

import polars as pl
import pytest

from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset
from nested_core.rooms.secrets.sensitive_data import SENSITIVE_PATTERNS, find_sensitive_pattern_bits
from tests.builders.data_sets import load
from tests.core.data.conftest import WriteData

# In two halves, so that no scanner takes this file for a leak.
HOLDING = {
    "private key": ["-----BEGIN RSA PRIV" + "ATE KEY-----", "-----BEGIN PRIV" + "ATE KEY-----"],
    "AWS key": ["id AKIA" + "IOSFODNN7EXAMPLE.", "ASIA" + "Y34FZKBOKMUTVV7A"],
    "GitHub token": ["ghp_" + "aB3" * 12, "github_pat_" + "11ABCDEFG0" * 3],
    "GitLab token": ["glpat-" + "aBcD1234" * 3],
    "Slack token": ["xoxb-" + "123456789012-abcdefABCDEF"],
    "Google key": ["AIza" + "SyA1b2C3d" * 3 + "e4F5g6h7"],
    "Anthropic key": ["sk-ant-" + "api03-aB3dE5fG7hI9jK1lM3nO5p"],
    "OpenAI key": ["sk-" + "aB3dE5fG7hI9jK1lM3nO5p", "sk-proj-" + "aB3dE5fG7hI9jK1lM3nO5p"],
    "Hugging Face token": ["hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH"],
    "JSON web token": [
        "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVm"
    ],
    "password": ["password = 'hunter2000'", 'DB_PASSWORD="s3cr3tpass"', "api_key: 8f7d6c5b4a39"],
    "e-mail address": ["Write to jane.doe+list@mail.example-firm.co.uk.", "<bob@web.de>"],
    "phone number": ["+49 30 1234567", "+1 (415) 555-2671", "(415) 555-2671", "415-555-2671"]
    + ["+442071838750", "+1 20 345 67"],  # the shortest has 8 digits
    "card number": ["4111 1111 1111 1111", "5500-0000-0000-0004", "340000000000009"],
    "IBAN": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "NO9386011117947"],
}
LOOK_ALIKES = [
    "-----BEGIN CERTIFICATE-----",
    "-----BEGIN PUBLIC KEY-----",
    "The private key is kept in a safe.",
    "AKIA is a prefix of four letters; AKIAB too.",
    "ghp_short and github_pat_ are prefixes",
    "sk-learn-contrib-imbalanced-learn is a package",
    "sk-ant-colony-optimisation-algorithm-tutorial",
    "hf_transfer, hf_hub_download and hf_repo_type_dataset_or_model_name",
    "hf_" + "a" * 34,
    "xoxo-kisses-and-more-kisses",
    "eyJhbGciOiJIUzI1NiJ9 is only the header",
    "What is your password? I forgot my password: sorry.",
    "password = os.environ['DB_PASSWORD_1']",
    "password: ********",
    "password=<your-password-1>",
    "api_key = get_key(1)",
    "the token: 12345678901",
    "secretkey: none whatsoever",
    "@decorator and @media (max-width: 600px)",
    "git@github.com:user/repository.git",
    "image@2x.png",
    "a@b, 5 @ 3.50",
    "mx@localhost",
    "2024-01-15 12:30:45",
    "1234-5678-9012",
    "192.168.100.200",
    "ISBN 978-0-306-40615-7",
    "3.14159265358979323846",
    "123e4567-e89b-12d3-a456-426614174000",
    "x +1000000 and 5+12345678",
    "+1 20 34 56",
    "10.1038/nature12373",
    "the years 1914-1918 and 1939-1945",
    "4111 1111 1111 1112",
    "the article 4006381333908",  # an EAN that begins and ends as a Visa of 13 digits would
    "1234567890123456",
    "0000000000000000",
    "DE89 3704 0044 0532 0130 01",
    "AB12 3456 7890 1234",
    "US12 3456 7890 1234 5678",
    "HTTP11 2000 OK",
]


def kinds_in(text: str) -> list[str]:
    bits = find_sensitive_pattern_bits(pl.Series([None, text], dtype=pl.String))
    assert bits[0] == 0
    return [kind.name for place, kind in enumerate(SENSITIVE_PATTERNS) if bits[1] >> place & 1]


@pytest.mark.parametrize(("kind", "text"), [(k, text) for k in HOLDING for text in HOLDING[k]])
def test_what_has_its_form_is_found_alone_and_in_a_sentence(kind: str, text: str) -> None:
    assert kinds_in(text) == [kind]
    assert kinds_in(f"Was für ein Satz:\n{text} (so what)") == [kind]


@pytest.mark.parametrize("text", LOOK_ALIKES)
def test_what_only_looks_alike_is_left_alone(text: str) -> None:
    assert kinds_in(text) == []


def test_every_kind_is_tried() -> None:
    assert {kind.name for kind in SENSITIVE_PATTERNS} == set(HOLDING)


def test_a_file_is_told_once_a_kind_with_the_count_and_the_first_lines(write_data) -> None:
    secret, address = HOLDING["GitHub token"][0], "jane.doe@firm.org"
    train = [{"text": f"plain text {n}"} for n in range(10)]
    train += [{"text": f"{n} {address}"} for n in range(8)]
    train += [{"text": f"{address} {secret}"}, {"text": secret}]
    valid = [{"messages": [], "text": f"mail {address}"}]
    report, _ = load_dataset(DataSettings(str(write_data(train=train, valid=valid))), None)
    found = [
        (finding.file, finding.line, finding.check, finding.message)
        for finding in report.warnings
        if finding.check in ("likely-secret", "personal-data")
    ]
    assert found == [
        (
            "train.jsonl",
            11,
            "personal-data",
            "what looks like personal data (e-mail address) in 9 lines: 11, 12, 13, 14, 15, ...",
        ),
        (
            "train.jsonl",
            19,
            "likely-secret",
            "what looks like a secret (GitHub token) in 2 lines: 19, 20; "
            "take it out, and change it where it is in use",
        ),
    ]
    shown = json.dumps(report.to_json())
    assert secret not in shown
    assert address not in shown


def test_the_arguments_of_a_tool_are_looked_at_too(write_data: WriteData) -> None:
    call = {"function": {"name": "send", "arguments": {"to": "jane.doe@firm.org"}}}
    turns = [
        {"role": "user", "content": "Send it."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    folder = write_data(train=[{"messages": turns}], valid=[{"text": "x"}])
    report, _ = load(folder, batch_size=1)
    found = [(f.file, f.line) for f in report.warnings if f.check == "personal-data"]
    assert found == [("train.jsonl", 1)]


# What a pattern could try again from each place: beginnings, words, separators, without an end.
PIECES = [
    *("-eyJaaaaaaaa", "eyJaaaaaaaa", "eyJaaaaaaaa.", "-eyJaaaaaaaa.eyJaaaaaaaa", "-----BEGIN A"),
    *("-----BEGIN ", "A ", "AKIA", "ghp_aaaaaaaa", "github_pat_", "glpat-a", "xoxb-a", "AIza"),
    *("sk-ant-", "sk-a", "hf_", "hf_a ", "password ", "password=", "password = '", "api_key: ("),
    *("a@a.", "a@", "a.", "aB3", "1", "1 ", "1-", "+1 ", "(415) ", "DE12 ", "A1", "DE89 3704 "),
    *(" ", "\n"),
]
STARTS = ["", "-----BEGIN ", "password ", "a@", "eyJaaaaaaaa.eyJaaaaaaaa", "ghp_", "+1", "DE12"]


def longest_search(characters: int) -> dict[str, float]:
    """The processor seconds that each pattern takes for the worst of the hostile texts."""
    worst = dict.fromkeys([kind.name for kind in SENSITIVE_PATTERNS], 0.0)
    texts = [piece * (characters // len(piece)) for piece in PIECES]
    texts += [start + piece * characters for start in STARTS for piece in "aA1 "]
    for text in texts:
        for kind in SENSITIVE_PATTERNS:
            began = time.process_time()
            kind.occurs_in(text)
            worst[kind.name] = max(worst[kind.name], time.process_time() - began)
    return worst


@pytest.mark.slow("reads megabytes of hostile text")
def test_no_pattern_takes_quadratic_time_over_hostile_text() -> None:
    # A linear search of so many characters takes 0.005 s; the quadratic one of before took 0.2 s.
    for name, seconds in longest_search(40_000).items():
        assert seconds < 0.1, name


def test_a_header_of_a_web_token_may_begin_within_a_word() -> None:
    token = HOLDING["JSON web token"][0]
    assert kinds_in(f"x-{token}") == ["JSON web token"]
    assert kinds_in(f"a.b.{token}") == ["JSON web token"]
    assert kinds_in(f"x{token}") == []
