"""Text of others on one line, without a character that acts on what shows it."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_core.errors import ConfigError
from nested_core.text.foreign_text import escape, escape_but_keep_newlines, escape_markdown
from tests.hostile_text import HOSTILE, MARK, assert_safe

ANY_TEXT = st.text(st.characters(codec=None))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_string_is_safe_and_can_still_be_read(text: str) -> None:
    for shown in (escape(text), escape_markdown(text), str(ConfigError(escape(text)))):
        assert_safe(shown)
        assert "\n" not in shown
        assert MARK in shown


@given(ANY_TEXT)
def test_no_character_of_a_category_that_acts_or_hides_is_left(text: str) -> None:
    shown = escape(text)
    categories = {unicodedata.category(character) for character in shown}
    assert not categories & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    shown.encode()
    assert escape(shown) == shown


@given(st.text(st.characters(categories=("L", "N", "P", "Zs"), max_codepoint=0x2FF)))
def test_words_of_languages_stay_as_they_are(text: str) -> None:
    assert escape(text) == text


def test_what_was_escaped_can_be_told() -> None:
    assert escape("a\x1b[2J\x9bb\u202ec\U000e0041\n") == "a\\x1b[2J\\x9bb\\u202ec\\U000e0041\\n"
    assert escape("caf\udce9") == "caf\\xe9"  # the byte of a file name, as os.fsdecode has it
    assert escape("\ud800") == "\\ud800"


def test_an_error_keeps_its_own_lines_and_nothing_else() -> None:
    assert str(ConfigError("first\n  second \x1b[2J")) == "first\n  second \\x1b[2J"
    assert escape_but_keep_newlines("a\r\nb") == "a\\r\nb"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[x](https://a.b)", r"\[x\](https:\//a.b)"),
        ("![x](y)", r"!\[x\](y)"),
        ("a | b `c` <img>", r"a \| b \`c\` \<img\>"),
        ("**b** _i_ ~~s~~", r"\*\*b\*\* \_i\_ \~\~s\~\~"),
        ("www.a.b me@a.b &lt;", r"www\.a.b me\@a.b \&lt;"),
        ("model.layers.0.q_proj.lora_a", "model.layers.0.q_proj.lora_a"),
    ],
)
def test_markdown_shows_as_it_stands(text: str, shown: str) -> None:
    assert escape_markdown(text) == shown
