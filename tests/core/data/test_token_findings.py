"""What only the tokens tell: cut, endless, short and overlong examples, by file, line and check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import tokenization_utils_base

from nested_core.data.rules.token_rules import length_outlier_bound
from nested_core.data.tokens import parallel_tokenization
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from tests.builders.data_sets import found_in, load, warnings_in
from tests.core.data.conftest import TEMPLATE, WriteData, build_tokenizer


def chat(*answers: str) -> dict[str, Any]:
    """A conversation with these answers."""
    turns = []
    for number, answer in enumerate(answers):
        turns.append({"role": "user", "content": f"Question {number} of {answers}?"})
        turns.append({"role": "assistant", "content": answer})
    return {"messages": turns}


HELD_OUT = [chat("In Zland.")]
GOOD = [chat(f"In {place}land.") for place in "ABCD"]


@pytest.mark.parametrize("targets", [{"mask_prompt": True}, {"supervise": "all"}])
def test_an_answer_of_one_token_is_counted_from_the_first_such_line(
    targets: dict[str, Any], write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    train = [*GOOD, chat("A"), chat("AB."), chat("B")]
    folder = write_data(train=train, valid=HELD_OUT)
    report = load(folder, tokenizer, **targets)[0]
    assert found_in(report, "warning") == [("train.jsonl", 5, "short-answer")]
    expected = (
        "examples with an answer of less than two tokens before its end: 2, from this one on; "
        "right where answers are labels"
    )
    assert report.warnings[0].message == expected


def test_under_all_one_short_turn_makes_a_short_answer_and_under_last_only_the_last(
    write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    folder = write_data(train=[*GOOD, chat("A", "In Aland.")], valid=HELD_OUT)
    found = warnings_in(folder, tokenizer, mask_prompt=True)
    assert found == [("train.jsonl", None, "earlier-answers")]
    found = warnings_in(folder, tokenizer, supervise="all")
    assert found == [("train.jsonl", 5, "short-answer")]


def test_under_all_every_turn_needs_its_end(write_data: WriteData) -> None:
    only_last_ends = TEMPLATE.replace(
        "<|end|>{% endfor %}",
        "{% if loop.last or m.role != 'assistant' %}<|end|>{% endif %}{% endfor %}",
    )
    asked = only_last_ends.replace("loop.last or", "(loop.last and messages | length > 2) or")
    tokenizer = build_tokenizer(asked)
    folder = write_data(train=[chat("In A.", "In B.")], valid=[])
    found = warnings_in(folder, tokenizer, supervise="all", batch_size=1)
    assert ("train.jsonl", 1, "no-end-of-sequence") in found
    found = warnings_in(folder, tokenizer, mask_prompt=True, batch_size=1)
    assert ("train.jsonl", 1, "no-end-of-sequence") not in found


def test_an_example_far_longer_than_the_rest_is_named_with_how_many_there_are(
    write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    rows = [{"text": "river " * (4 + n % 5) + str(n)} for n in range(40)]
    rows[6], rows[20] = {"text": "lake " * 200}, {"text": "sea " * 300}
    folder = write_data(train=rows, valid=[{"text": "somewhere else"}])
    report = load(folder, tokenizer, max_seq_length=4096)[0]
    assert found_in(report, "warning") == [("train.jsonl", 21, "length-outlier")]
    assert ": 2; the longest is this one, of " in report.warnings[0].message


def test_the_bound_of_outliers_is_the_outer_fence_on_a_logarithmic_scale() -> None:
    even = np.full(100, 50, np.int32)
    assert length_outlier_bound(even) == 200
    spread = np.array([100] * 50 + [200] * 50, np.int32)
    assert length_outlier_bound(spread) == 200 * 2**3
    assert length_outlier_bound(even[:19]) > 2_000_000_000
    skewed = np.random.default_rng(0).lognormal(5.3, 0.9, 20_000).clip(8, 8192).astype(np.int32)
    assert length_outlier_bound(skewed) > skewed.max()


def test_truncation_says_how_many_the_worst_and_the_tokens_lost(write_data, tokenizer) -> None:
    rows = [*GOOD, chat("y" * 80), chat("z" * 150), chat("w" * 100)]
    folder = write_data(train=rows, valid=HELD_OUT)
    report, splits = load(folder, tokenizer, max_seq_length=64)
    assert found_in(report, "warning") == [("train.jsonl", 6, "truncated")]
    whole = load(folder, tokenizer)[1]["train"].lengths
    cut = splits["train"].lengths
    message = (
        f"examples cut to 64 tokens: 3, tokens lost: {(whole - cut).sum()}; "
        f"the worst is this one, of {whole[5]} tokens. Shorten them, or raise max_seq_length"
    )
    assert report.warnings[0].message == message


def test_the_infos_count_tokens_and_padding(write_data, tokenizer) -> None:
    rows = [{"text": "ab " * n} for n in (2, 4, 14, 16, 40)]
    folder = write_data(train=rows, valid=[{"text": "somewhere else"}])
    report, splits = load(folder, tokenizer, batch_size=2)
    lengths = splits["train"].lengths
    infos = {f.check: f.message for f in report.findings if f.file == "train.jsonl"}
    p50, longest = sorted(lengths)[2], max(lengths)
    assert infos["tokens"] == (
        f"{lengths.sum():,} in all; a row: median {p50}, p95 {longest}, longest {longest}"
    )
    assert infos["supervised"] == (
        f"{lengths.sum() - 5:,} tokens, {(lengths.sum() - 5) / lengths.sum():.1%} of all"
    )
    tokens = report.splits["train"].tokens
    assert tokens is not None
    assert infos["padding"] == f"{tokens.padding_share:.1%} of batches of 2, which have 3 widths"
    assert tokens.widths == 3
    widths = [n - 1 + (n - 1) % 2 for n in sorted(lengths)[::-2]]  # even: kernels take no others
    expected = 1 - (lengths.sum() - 5) / (2 * sum(widths))
    assert tokens.padding_share == pytest.approx(expected)


@pytest.mark.parametrize("overlong", ["truncate", "error", "drop"])
def test_a_row_of_too_many_characters_is_not_given_to_the_tokenizer(
    overlong, write_data, tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr(parallel_tokenization, "MAX_ROW_CHARACTERS", 300)
    short, long = {"text": "x" * 300}, {"text": "x" * 301}
    folder = write_data(train=[{"text": "a b"}, long, short, {"text": "c"}, {"text": "d"}])
    settings: dict[str, Any] = {
        "max_seq_length": 8,
        "batch_size": 2,
        "policy": {"overlong": overlong},
    }
    report = load(folder, tokenizer, **settings)[0]
    found = [finding for finding in report.findings if finding.check == "row-too-long"]
    if overlong == "drop":
        assert found == []
        assert report.splits["train"].dropped["overlong"] == (2, 3)
        return
    assert [(each.file, each.line) for each in found] == [("train.jsonl", 2)]
    assert found[0].severity == "error"
    assert found[0].message.startswith("301 characters, of which 8 tokens (max_seq_length) would")
    allowed = load(folder, tokenizer, **settings | {"max_seq_length": 16})[0]
    assert "row-too-long" not in {finding.check for finding in allowed.findings}


def test_tools_count_among_the_characters_of_a_row(write_data, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(parallel_tokenization, "MAX_ROW_CHARACTERS", 300)
    tool = {"type": "function", "function": {"name": "f", "description": "x" * 400}}
    folder = write_data(train=[*GOOD, chat("A land.") | {"tools": [tool]}], valid=HELD_OUT)
    report = load(folder, tokenizer, max_seq_length=8)[0]
    found = [place for place in found_in(report) if place[2] == "row-too-long"]
    assert found == [("train.jsonl", 5, "row-too-long")]


def test_examples_beyond_the_models_context_are_counted(write_data: WriteData) -> None:
    source = build_tokenizer(TEMPLATE)
    Path(source.folder, "config.json").write_text('{"max_position_embeddings": 60}')
    folder = write_data(train=[*GOOD, chat("A" * 90), chat("B" * 80)], valid=HELD_OUT)
    report = load(folder, source)[0]
    (finding,) = (f for f in report.warnings if f.check == "beyond-context")
    assert (finding.file, finding.line) == ("train.jsonl", 5)
    assert finding.message.startswith("examples longer than the 60 tokens that the model can see ")
    assert ": 2; the longest is this one" in finding.message
    tokens = report.splits["train"].tokens
    assert tokens is not None
    assert (tokens.context, tokens.beyond_context) == (60, 2)
    assert str(finding) in report.describe_warnings()
    cut = load(folder, source, max_seq_length=60)[0]
    assert [finding.check for finding in cut.warnings] == ["truncated"]


def test_transformers_does_not_warn_of_a_length_that_the_report_counts(monkeypatch) -> None:
    source = build_tokenizer(TEMPLATE)
    settings = Path(source.folder, "tokenizer_config.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 6}))
    warned: list[str] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", warned.append)
    assert len(source.load().encode("The river is near. " * 9)) > 6
    assert warned == []
