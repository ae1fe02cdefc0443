"""`nested-tune init` and `explain`, as a person types them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nested_core import load_config
from tests.example import DATA, MODEL
from tests.flows.conftest import called

pytestmark = pytest.mark.slow("runs init, explain and train")

INIT = ("init", "--data", str(DATA), "--model", str(MODEL))


def test_init_writes_a_configuration_that_explain_takes(tmp_path: Path) -> None:
    done = called(*INIT, "-o", "lora.yaml", cwd=tmp_path)
    assert (done.code, done.stdout) == (
        0,
        "Written: lora.yaml. Next: `nested-tune explain -c lora.yaml`\n",
    )
    assert load_config(tmp_path / "lora.yaml").data == str(DATA)
    explained = called("explain", "-c", "lora.yaml", "--json", cwd=tmp_path)
    assert explained.code == 0
    assert {"trained", "tiers", "memory", "gate"} <= json.loads(explained.stdout).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["lora.yaml"]


@pytest.mark.slow("writes and explains a configuration")
def test_init_cuts_at_what_the_model_can_see_and_explain_counts_what_is_longer(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    rows = [{"completion": "Near. " * (n * 4)} for n in range(1, 11)]
    for split, first in (("train", 0), ("valid", 100)):
        asked = [f"Where is {first + n}?" for n in range(1, 11)]
        lines = [
            json.dumps(row | {"prompt": prompt}) for row, prompt in zip(rows, asked, strict=True)
        ]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    arguments = ("--data", "data", "--model", str(MODEL))
    done = called("init", *arguments, "-o", "lora.yaml", cwd=tmp_path)
    assert done.code == 0
    assert load_config(tmp_path / "lora.yaml").max_seq_length == 64
    assert "longer than the model can see and are cut" in (tmp_path / "lora.yaml").read_text()
    assert "data: 2 warnings (truncated 2), explained by" in done.stderr
    assert re.search(
        r"warning: \d of 10 rows of train.jsonl are too long and cut: \d+ tokens are lost; \d+ "
        r"answer tokens are left\n",
        done.stderr,
    )
    with (tmp_path / "data" / "train.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"prompt": "Where? " * 40, "completion": "Near."}))
    done = called("init", *arguments, "-o", "drop.yaml", cwd=tmp_path)
    assert load_config(tmp_path / "drop.yaml").data_policy.overlong == "drop"
    assert re.search(
        r"warning: \d of 11 rows of train.jsonl are too long and left out; \d+ answer tokens",
        done.stderr,
    )
    explained = called("explain", *arguments, "--num-layers", "-1", cwd=tmp_path)
    assert "longer than the 64 tokens that the model can see" in explained.stdout


def test_init_prints_the_configuration_and_writes_over_no_file(tmp_path: Path) -> None:
    done = called(*INIT, cwd=tmp_path)
    assert (done.code, list(tmp_path.iterdir())) == (0, [])
    path = tmp_path / "mine.yaml"
    path.write_text(done.stdout)
    assert load_config(path).model == str(MODEL)
    (tmp_path / "link.yaml").symlink_to("nowhere")
    for name in ("mine.yaml", "link.yaml"):
        refused = called(*INIT, "-o", name, cwd=tmp_path)
        assert refused.code == 2
        assert f"{name} exists, and is not written over." in refused.message()
    assert path.read_text() == done.stdout


def test_init_for_data_with_errors_is_exit_3(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    done = called("init", "--data", ".", "--model", str(MODEL), cwd=tmp_path)
    assert done.code == 3
    assert "is rejected" in done.message()
