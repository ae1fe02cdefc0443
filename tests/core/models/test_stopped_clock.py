"""A chat template that reads the clock: its prompts are the same on each day."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from nested_core.models.chat_template import FIXED_DATE, ChatTemplate, stopped_clock
from tests.example import MODEL

TURNS = [{"role": "user", "content": "Where to?"}]
OF_LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}Today: {{ date_string }}|"
)


class Clock(datetime):
    """A day that is neither today nor the fixed one."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime(2031, 5, 4, 3, 2, 1, tzinfo=tz)


def tokenizer_of(beginning: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = beginning + tokenizer.chat_template
    return tokenizer


def on_another_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def test_a_prompt_is_the_same_on_another_day(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tokenizer_of(OF_LLAMA)
    template = ChatTemplate(tokenizer_of(OF_LLAMA))
    today = template.tokenize(TURNS)
    assert template.render(TURNS).startswith("Today: 26 Jul 2024|")
    on_another_day(monkeypatch)
    assert template.tokenize(TURNS) == today
    shown = plain.apply_chat_template(TURNS, tokenize=False)
    assert shown.startswith("Today: 04 May 2031|")  # without our clock
    assert shown.removeprefix("Today: 04 May 2031") == template.render(TURNS).removeprefix(
        "Today: 26 Jul 2024"
    )


def test_a_date_that_a_client_gives_is_written() -> None:
    template = ChatTemplate(tokenizer_of(OF_LLAMA))
    assert template.render(TURNS, date_string="a day").startswith("Today: a day|")


@pytest.mark.parametrize(
    ("directive", "shown"),
    [
        *((f"%{each}", f"{FIXED_DATE:%{each}}") for each in "aAbBcdDeFGHIjmMpSTUuVwWxXyYzZ"),
        *(("%-d", "26"), ("%-m", "7"), ("%-M", "0"), ("%-I", "12"), ("%e %B", "26 July")),
        *(
            ("%I:%M %p", "12:00 PM"),
            ("%d %B %Y", "26 July 2024"),
            ("100 %%", "100 %"),
            ("%%d", "%d"),
        ),
    ],
)
def test_each_directive_is_that_of_one_moment(directive: str, shown: str) -> None:
    tokenizer = tokenizer_of(f"{{{{ strftime_now('x{directive}') }}}}|")
    assert ChatTemplate(tokenizer).render(TURNS).partition("|")[0] == f"x{shown}"


def test_one_of_several_templates_is_stopped_and_the_tokenizer_keeps_them() -> None:
    tokenizer = tokenizer_of("")
    plain = tokenizer.chat_template
    dated = "{{ strftime_now('%Y') }}|" + plain
    tokenizer.chat_template = {"default": dated, "tool_use": "tools|" + dated}
    template = ChatTemplate(tokenizer)
    assert template.render(TURNS).startswith("2024|")
    assert template.render(TURNS, []).startswith("tools|2024|")
    assert tokenizer.chat_template == {"default": dated, "tool_use": "tools|" + dated}
    tokenizer.chat_template = {"default": plain}
    assert stopped_clock(tokenizer) == {}


def test_a_template_without_a_clock_stays() -> None:
    assert stopped_clock(tokenizer_of("|")) == {}


@pytest.mark.parametrize(
    "beginning",
    [
        "\n  {{ strftime_now('') }}",
        "  {% set day = strftime_now('') %}|",
        " x{{ strftime_now('') }}",
    ],
)
def test_the_beginning_of_a_template_stays(beginning: str) -> None:
    plain = tokenizer_of(beginning).apply_chat_template(TURNS, tokenize=False)
    assert ChatTemplate(tokenizer_of(beginning)).render(TURNS) == plain
