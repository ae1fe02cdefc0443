"""The counter of words and sentences, on texts whose figures are known."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = runpy.run_path(str(ROOT / "docs" / "check_prose.py"))
PAGE = """\
# A heading is not a sentence.

One sentence with `some inline code` in it. Is this the second? Yes: it
is; and a colon ends none.

- An item of a list without its stop
- a label

| column | what it is |
|---|---|
| `x` | The first cell of the table. Its second sentence. |
| 0.91 | mlx_lm.lora e.g. in version 0.32 of it |

```
A block of code is no prose at all.
```
"""


def test_the_sentences_of_a_page_are_those_that_a_person_would_count() -> None:
    assert list(TOOL["read_markdown"](PAGE)) == [
        "One sentence with `code` in it.",
        "Is this the second?",
        "Yes: it is; and a colon ends none.",
        "An item of a list without its stop",
        "The first cell of the table.",
        "Its second sentence.",
        "mlx_lm.lora e.g. in version 0.32 of it",
    ]


def test_a_line_of_a_block_that_its_column_cuts_off_is_found() -> None:
    page = f"{'word ' * 30}.\n\n```\n{'a' * 86}\n{'b' * 87}\n```\n\n    {'c' * 87}\n"
    wide = tuple(TOOL["read_wide_lines"](page))
    assert wide == ("b" * 87, "c" * 87)
    first, second = TOOL["Prose"]("x.md", (), wide).find_problems()
    assert first == f"x.md: 87 characters in a block, at most 86: {'b' * 87}"
    assert second.endswith("c" * 87)


def test_a_docstring_with_a_riddle_is_found(tmp_path: Path) -> None:
    for package, docstring in {
        "gate": "The loss; None where\n    there is none.",
        "records": "The loss; None without a measurement.",
    }.items():
        file = tmp_path / "nested_core" / package / "losses.py"
        file.parent.mkdir(parents=True)
        file.write_text(f'x = 1\n\n\ndef loss():\n    """{docstring}"""\n')
    (problem,) = TOOL["find_riddles"](tmp_path)
    assert problem == "nested_core/gate/losses.py:5: 'None where' in a docstring"


def test_messages_and_help_are_read_with_a_word_for_each_placeholder() -> None:
    source = (
        "def f(path, n):\n"
        '    """A docstring is no message."""\n'
        '    raise ConfigError(f"{path}, line {n}: `a key` is not known. "\n'
        '                      "Give another one of the list.")\n'
        'print("This is printed and not raised.")\n'
        'parser.add_argument("--to", help="the version to go back to")\n'
        'rate: float = key(1e-5, "step size of the optimizer")\n'
        'Text("Nothing was compared in this run.", "warn")\n'
    )
    assert sorted(TOOL["read_messages"](source)) == [
        "Give another one of the list.",
        "Nothing was compared in this run.",
        "X, line X: `code` is not known.",
        "step size of the optimizer",
        "the version to go back to",
    ]


@pytest.mark.parametrize(
    ("sentence", "problem"),
    [
        ("word " * 40 + "end.", "41 words, at most 40"),
        ("The bounds stand in the settings file here.", "'stand'"),
        ("That nothing changed is said in the log.", "'is said'"),
        ("Who keeps runs has to prune them.", "'Who keeps'"),
    ],
)
def test_each_limit_is_seen_to_be_passed(sentence: str, problem: str) -> None:
    page = TOOL["Prose"]("page.md", (sentence, *["Four words are enough."] * 30))
    (found,) = page.find_problems()
    assert found.startswith("page.md: ")
    assert problem in found


def test_the_mean_the_share_of_long_ones_and_semicolons_are_limits_of_a_page() -> None:
    long = TOOL["Prose"]("page.md", ("word " * 28 + "end.",) * 2 + ("Short; it is.",))
    assert [line.partition(": ")[2] for line in long.find_problems()] == [
        "20.3 words a sentence, at most 15",
        "66.7% of the sentences have more than 28 words",
        "33.3% of the sentences have a semicolon",
    ]
