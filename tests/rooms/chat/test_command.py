"""`chat`: base and adapter answer side by side, as plain mlx_lm would with either of them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load

from flows.rooms.chat import command
from flows.rooms.chat.command import lay_out, show_answers
from nested_core.errors import ConfigError
from nested_core.models.generation import Sampling
from nested_core.rooms.chat.side_by_side import SideBySide, stream_answer
from tests.builders.adapter_folders import Arrays, change_config, change_tensors
from tests.builders.registering import register_and_promote
from tests.example import MODEL, generate_answers
from tests.flows.conftest import CommandRun, Ended, called

pytestmark = pytest.mark.slow("answers with two models side by side")

QUESTION = "I want to see Italy. Where to?"


def ask(target: object, cwd: Path, *more: object) -> Ended:
    return called("chat", target, *more, "--max-tokens", 12, cwd=cwd)


def test_each_prompt_is_answered_by_both_as_plain_mlx_lm_answers_it(command_run) -> None:
    done = ask("run", command_run.folder, "--prompt", QUESTION, "--prompt", QUESTION)
    adapter = command_run.run_dir / "adapter"
    (base,) = generate_answers(str(MODEL), [QUESTION], max_tokens=12)
    (trained,) = generate_answers(str(MODEL), [QUESTION], adapter=adapter, max_tokens=12)
    assert done.code == 0
    assert done.stdout.splitlines() == [f"adapter: {trained}", f"base:    {base}"] * 2
    assert base != trained


def test_a_champion_is_asked_by_registry_and_name_a_line_at_a_time(
    command_run: CommandRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_and_promote(command_run.run_dir, tmp_path / "registry", "capitals", {}, by="a test")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n\n/help\n/new\n{QUESTION}\n"))
    done = ask(tmp_path / "registry" / "capitals", tmp_path)
    assert done.code == 0
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["adapter", "base"] * 2
    assert lines[:2] == lines[2:]  # a new conversation remembers nothing


@pytest.fixture
def smaller(command_run: CommandRun, tmp_path: Path) -> Path:
    """The run's adapter with half of its rank: another shape, and other answers."""
    folder = Path(shutil.copytree(command_run.run_dir / "adapter", tmp_path / "smaller"))

    def halve(tensors: Arrays) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor[:, :4] if name.endswith("lora_a") else tensor[:4]

    change_tensors(folder, halve)
    return change_config(folder, lambda config: config["lora_parameters"].update(rank=4))


@pytest.mark.slow("answers two prompts three times with each of three models")
def test_two_adapters_and_the_base_answer_in_turn_and_are_saved(
    command_run: CommandRun, smaller: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"\ufeff{QUESTION}\n\nI want to see Fiji. Where to?\n", encoding="utf-8")
    saved = tmp_path / "answers.jsonl"
    words = ("--prompts", prompts, "--save", saved)
    done = ask("run", command_run.folder, smaller, *words)
    assert done.code == 0, done.stderr
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [QUESTION, "I want to see Fiji. Where to?"]
    assert [row["turn"] for row in rows] == [1, 1]  # each a conversation of its own
    adapters = {"base": None, "run": command_run.run_dir / "adapter", str(smaller): smaller}
    asked = [row["prompt"] for row in rows]
    for side, adapter in adapters.items():
        expected = generate_answers(str(MODEL), asked, adapter=adapter, max_tokens=12)
        assert [row["answers"][side].strip() for row in rows] == expected
    shown = [line.partition(": ")[0] for line in done.stdout.splitlines()]
    assert shown == ["run", str(smaller), "base"] * 2
    assert ask("run", command_run.folder, *words).code == 0  # adds to what was saved
    assert len(saved.read_text().splitlines()) == 4


def test_a_system_message_begins_each_conversation(command_run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\nAnd then?\n/new\n{QUESTION}\n"))
    saved = tmp_path / "answers.jsonl"
    done = ask("run", command_run.folder, "--system", "Say a city.", "--save", saved)
    assert done.code == 0, done.stderr
    first, second, again = (json.loads(line) for line in saved.read_text().splitlines())
    assert [row["turn"] for row in (first, second, again)] == [1, 2, 1]
    assert first == again
    models = SideBySide(
        {"adapter": command_run.run_dir / "adapter"}, model=str(MODEL), trust_remote_code=False
    )
    chat = [
        {"role": "system", "content": "Say a city."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first["answers"]["base"]},
        {"role": "user", "content": "And then?"},
    ]
    pieces = models.stream_answers({"base": chat}, Sampling(12))
    assert second["answers"]["base"] == "".join(piece for _, piece in pieces)


def test_the_base_is_in_memory_once(command_run: CommandRun, smaller: Path) -> None:
    before = mx.get_active_memory()
    adapters = {"a": command_run.run_dir / "adapter", "b": smaller}
    models = SideBySide(adapters, model=str(MODEL), trust_remote_code=False)
    for side in models.sides:
        models.ask(side, QUESTION, max_tokens=2)
    base = (MODEL / "model.safetensors").stat().st_size
    adapter_bytes = sum((f / "adapters.safetensors").stat().st_size for f in adapters.values())
    assert mx.get_active_memory() - before < 1.2 * base + adapter_bytes


def test_adapters_of_two_bases_are_refused(command_run, smaller, tmp_path) -> None:
    change_config(smaller, lambda config: config.update(base_fingerprint=f"sha256:{'0' * 64}"))
    done = ask("run", command_run.folder, smaller, "--prompt", QUESTION)
    assert done.code == 2
    assert "made for the base sha256:" in " ".join(done.message().split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "run"), "give one adapter, or two different ones"),
        (("run", "a", "b"), "give one adapter, or two different ones"),
        (("run", "--prompt", ""), "--prompt: there is no text in it"),
        (("run", "--prompt", " \n"), "--prompt: there is no text in it"),
        (("run", "--prompts", "absent.txt"), "absent.txt is missing. Give a text file"),
        (("run", "--prompts", "empty.txt"), "empty.txt has no line"),
        (("run", "--prompts", "latin.txt"), "latin.txt is not UTF-8"),
        (("run", "--save", "run/answers.jsonl", "--prompt", "x"), "run/answers.jsonl"),
    ],
)
def test_what_cannot_be_asked_or_saved_is_refused_before_anything_is_loaded(
    command_run: CommandRun, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr(SideBySide, "__init__", load)
    (command_run.folder / "empty.txt").write_text("\n \n")
    (command_run.folder / "latin.txt").write_bytes(b"\xe9t\xe9\n")
    done = called("chat", *words, cwd=command_run.folder)
    assert done.code == 2
    assert said in " ".join(done.message().split())


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
    adapters = {"adapter": command_run.run_dir / "adapter"}
    both = SideBySide(adapters, model=str(MODEL), trust_remote_code=False)
    question = [{"role": "user", "content": "I want to see " + "Italy and " * 18 + "Where to?"}]
    prompt = both._encode(question)
    pieces = list(both.stream_answers({"base": question}, Sampling(10_000)))
    assert len(prompt) < 64
    assert len(pieces) <= 64 - len(prompt)


def test_what_is_no_run_and_no_name_is_said(tmp_path: Path) -> None:
    done = ask(tmp_path, tmp_path, "--prompt", "x")
    assert done.code == 2
    said = "is neither a run directory (it has no config.yaml) nor a name in a registry"
    assert said in " ".join(done.message().split())
    assert called("chat", tmp_path, "--max-tokens", "0", cwd=tmp_path).code == 2


def test_ctrl_c_in_an_answer_ends_with_130(command_run, monkeypatch) -> None:
    def interrupted(*_: object) -> dict[str, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "show_answers", interrupted)
    assert ask("run", command_run.folder, "--prompt", QUESTION).code == 130


def test_text_of_a_model_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    pieces = [("base", "\x1b[2J"), ("adapter", "[red]a\n"), ("adapter", "b")]
    answers = show_answers(pieces, ("base", "adapter"))
    assert answers == {"base": "\x1b[2J", "adapter": "[red]a\nb"}
    assert capsys.readouterr().out == "base:    \\x1b[2J\nadapter: [red]a\\nb\n"
    cells = [list(column.cells) for column in lay_out({"base": "\x07", "adapter": "[b]"}).columns]
    assert [str(cell) for column in cells for cell in column] == ["\\x07", "[b]"]


def test_the_system_text_that_all_rows_share_begins_a_conversation_unless_another_is_given(
    command_run: CommandRun, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(command_run.run_dir, tmp_path / "run"))
    dataset = json.loads((run / "dataset.json").read_text())
    assert dataset["prompt_format"] == {"is_chat": True, "system": None, "tools": None}
    dataset["prompt_format"]["system"] = "Say a city."
    (run / "dataset.json").write_text(json.dumps(dataset))
    said = []
    for name, words in {
        "its own": (),
        "none": ("--system", ""),
        "other": ("--system", "X"),
    }.items():
        saved = tmp_path / f"{name}.jsonl"
        done = ask(run, tmp_path, *words, "--prompt", QUESTION, "--save", saved)
        assert done.code == 0, done.stderr
        said.append(json.loads(saved.read_text())["system"])
        assert ("system text of its training rows" in done.stderr) == (name == "its own")
    assert said == ["Say a city.", None, "X"]


def test_the_adapters_line_is_whole_before_the_base_begins_which_is_cut_off_sooner(
    capsys: pytest.CaptureFixture[str], command_run: CommandRun
) -> None:
    adapters = {"adapter": command_run.run_dir / "adapter"}
    both = SideBySide(adapters, model=str(MODEL), trust_remote_code=False)
    question = [{"role": "user", "content": QUESTION}]
    pieces = list(both.stream_answers(dict.fromkeys(both.sides, question), Sampling(12), 3))
    assert list(dict.fromkeys(side for side, _ in pieces)) == ["adapter", "base"]
    assert sum(side == "base" for side, _ in pieces) <= 4  # the last is what remains to be decoded
    seen = []

    def watched():
        for side, piece in pieces:
            seen.append((side, capsys.readouterr().out))
            yield side, piece

    show_answers(watched(), both.sides)
    before_base = "".join(out for side, out in seen[: [side for side, _ in seen].index("base") + 1])
    trained = "".join(piece for side, piece in pieces if side == "adapter").strip()
    assert before_base == f"adapter: {trained}"


def test_a_token_beyond_the_embedding_is_refused_before_an_answer_begins() -> None:
    model, tokenizer = load(str(MODEL))[:2]
    tokenizer.add_tokens(["<|order|>"])
    asked = tokenizer.encode("<|order|>Where to?")
    with pytest.raises(ConfigError, match="the model has"):
        next(stream_answer(model, tokenizer, asked, Sampling(2)))
