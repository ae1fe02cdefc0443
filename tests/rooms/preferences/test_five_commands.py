"""From pairs to a champion that answers, by the five commands of docs/preferences.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nested_core.registry import read_champion
from tests.flows.conftest import called
from tests.left_out import needs_rooms
from tests.rooms.preferences.pair_data import BASE, list_pairs, write_pairs, write_rows

pytestmark = pytest.mark.slow("runs five commands, one after the other")

DOCUMENT = Path(__file__).parents[3] / "docs" / "preferences.md"
QUESTION = "I want to see Italy. Where to?"


def list_commands() -> list[list[str]]:
    """The commands of the first block of sh in the document, as words behind `nested-tune`."""
    (block,) = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    lines = [line.partition("#")[0].split() for line in block.splitlines()]
    assert {line[0] for line in lines} == {"nested-tune"}
    return [line[1:] for line in lines]


@needs_rooms("planning")
@pytest.mark.parametrize(("times", "epochs"), [(1, 3), (12, 1)])
def test_init_writes_few_passes_over_pairs_and_one_over_many(times, epochs, tmp_path) -> None:
    pairs = [
        row | {"prompt": f"{number}. {row['prompt']}"}
        for number in range(times)
        for row in list_pairs("train")
    ]
    write_rows(tmp_path / "pairs", {"train": pairs, "valid": list_pairs("valid")})
    words = ("init", "--data", "pairs", "--model", str(BASE), "-o", "dpo.yaml")
    assert called(*words, cwd=tmp_path).code == 0
    assert f"  epochs: {epochs}\n" in (tmp_path / "dpo.yaml").read_text()


@needs_rooms("planning", "serve")
@pytest.mark.slow("trains and judges a run of 100 steps, and serves it")
def test_the_commands_of_the_document_lead_from_pairs_to_a_served_champion(tmp_path: Path) -> None:
    from tests.rooms.serve.versions import serving, settings

    write_pairs(tmp_path / "pairs")
    *commands, serve = list_commands()
    assert [words[0] for words in commands] == ["init", "validate", "train", "promote"]
    for words in commands:
        given = [str(BASE) if word == "MODEL" else word for word in words]
        ended = called(*given, cwd=tmp_path)
        assert ended.code == 0, ended
    written = (tmp_path / "dpo.yaml").read_text()
    assert "loss: dpo" in written
    assert "# A tenth of the rate that suits the cross-entropy. To try others" in written
    assert serve == ["serve", "--registry", "registry", "--name", "polite"]
    registry = tmp_path / "registry"
    with serving(settings(registry, "--name", "polite")) as client:
        reply = client.chat(prompt=QUESTION)
    assert reply.status == 200
    assert reply.version == read_champion(registry, "polite")
    assert reply.text
