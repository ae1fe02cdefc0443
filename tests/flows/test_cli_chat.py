"""`chat`: base and adapter answer side by side, as plain mlx_lm would with either of them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from flows.commands import chat
from flows.commands.chat import lay_out, show_answers
from nested_core.models.generation import Sampling
from nested_core.models.side_by_side import BaseAndAdapter
from nested_core.registry import register_and_promote
from tests.example import MODEL, generate_answers
from tests.flows.conftest import CommandRun, Ended, called

QUESTION = "I want to see Italy. Where to?"


def ask(target: object, cwd: Path, *more: object) -> Ended:
    return called("chat", target, "--max-tokens", 12, *more, cwd=cwd)


def test_one_prompt_is_answered_by_both_as_plain_mlx_lm_answers_it(command_run) -> None:
    done = ask("run", command_run.folder, "--prompt", QUESTION)
    adapter = command_run.run_dir / "adapter"
    (base,) = generate_answers(str(MODEL), [QUESTION], max_tokens=12)
    (trained,) = generate_answers(str(MODEL), [QUESTION], adapter=adapter, max_tokens=12)
    assert done.code == 0
    assert done.stdout.splitlines() == [f"base:    {base}", f"adapter: {trained}"]
    assert base != trained


def test_a_champion_is_asked_by_registry_and_name_a_line_at_a_time(
    command_run: CommandRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_and_promote(command_run.run_dir, tmp_path / "registry", "capitals", {}, by="a test")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n\n/help\n/new\n{QUESTION}\n"))
    done = ask(tmp_path / "registry" / "capitals", tmp_path)
    assert done.code == 0
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["base", "adapter"] * 2
    assert lines[:2] == lines[2:]  # a new conversation remembers nothing


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("Where to? " * 100, "tokens, and the model sees 64 tokens. Ask in fewer words"),
        ("Where to? " * 100_001, "1,000,010 characters, and the model sees 64 tokens"),
    ],
    ids=["tokens", "characters"],
)
def test_what_the_model_cannot_see_is_refused(command_run, prompt, said) -> None:
    done = ask("run", command_run.folder, "--prompt", prompt)
    assert done.code == 2
    assert said in " ".join(done.message().split())


def test_an_answer_ends_where_the_context_does(command_run: CommandRun) -> None:
    both = BaseAndAdapter(
        command_run.run_dir / "adapter", model=str(MODEL), trust_remote_code=False
    )
    question = [{"role": "user", "content": "I want to see " + "Italy and " * 18 + "Where to?"}]
    prompt = both._encode(question)
    pieces = list(both.stream_answers({"base": question}, Sampling(10_000)))
    assert len(prompt) < 64
    assert len(pieces) <= 64 - len(prompt)


def test_what_is_no_run_and_no_name_is_said(tmp_path: Path) -> None:
    done = ask(tmp_path, tmp_path, "--prompt", "x")
    assert done.code == 2
    assert "is neither a run directory" in done.message()
    assert called("chat", tmp_path, "--max-tokens", "0", cwd=tmp_path).code == 2


def test_ctrl_c_in_an_answer_ends_with_130(command_run, monkeypatch) -> None:
    def interrupted(*_: object) -> dict[str, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "show_answers", interrupted)
    assert ask("run", command_run.folder, "--prompt", QUESTION).code == 130


def test_text_of_a_model_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    pieces = [("base", "\x1b[2J"), ("adapter", "[red]a\n"), ("adapter", "b")]
    assert show_answers(pieces) == {"base": "\x1b[2J", "adapter": "[red]a\nb"}
    assert capsys.readouterr().out == "base:    \\x1b[2J\nadapter: [red]a\\nb\n"
    cells = [list(column.cells) for column in lay_out({"base": "\x07", "adapter": "[b]"}).columns]
    assert [str(cell) for column in cells for cell in column] == ["\\x07", "[b]"]
