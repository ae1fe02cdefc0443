"""`training.reference: mlx_lm` against mlx_lm.lora itself, in a process of its own: equal bits.

A step in bfloat16 on a CPU takes a tenth of a second. Each case therefore trains on few examples in
small batches, for little more than an epoch; `make reliability` has each of them for fifty steps of
larger ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.loading import parse_config
from nested_core.errors import ConfigError
from nested_core.storage.safetensors_files import read_tensors
from tests.example import DATA, MODEL, train_example
from tests.fork_server import python
from tests.left_out import slow_except

pytestmark = pytest.mark.slow("trains by mlx_lm.lora too")

# Runs mlx_lm.lora's own `run` and notes what it hands to its reporting callback.
REFERENCE = """
import json, sys, types
import mlx_lm.lora as lora

seen = []

class Callback:
    def on_train_loss_report(self, info):
        seen.append(["loss", info["iteration"], info["train_loss"]])

    def on_val_loss_report(self, info):
        seen.append(["val_loss", info["iteration"], info["val_loss"]])

lora.get_reporting_callbacks = lambda *args, **kwargs: Callback()
lora.run(types.SimpleNamespace(**(lora.CONFIG_DEFAULTS | json.loads(sys.argv[1]))))
print(json.dumps(seen))
"""

SHARED: dict[str, Any] = {
    "model": str(MODEL),
    "data": "chats",
    "num_layers": -1,
    "batch_size": 2,
    "iters": 14,
    "learning_rate": 1e-3,
    "val_batches": 1,
    "steps_per_report": 1,
    "steps_per_eval": 5,
    "seed": 3,
    "mask_prompt": False,
    "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0},
}
DROPOUT = {"rank": 4, "scale": 2.0, "dropout": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "chat": {},
    "mask-prompt-adamw": {"mask_prompt": True, "optimizer": "adamw"},
    "dropout": {"lora_parameters": DROPOUT, "mask_prompt": True},
    "grad-checkpoint": {"grad_checkpoint": True, "lora_parameters": DROPOUT},
    "accumulation-with-a-remainder": {"grad_accumulation_steps": 4, "steps_per_report": 3},
    "text": {"data": "text", "optimizer": "adamw"},
    # Rows whose products are large enough for other kernels of BLAS.
    "long-text": {
        "data": "long-text",
        "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0},
    },
    "sgd": {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "optimizer_config": {"sgd": {"momentum": 0.9, "weight_decay": 0.01}},
    },
    "muon": {"optimizer": "muon", "optimizer_config": {"muon": {"weight_decay": 0.1}}},
    "adafactor": {"optimizer": "adafactor"},
    "schedule-dora": {
        "fine_tune_type": "dora",
        "lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 9], "warmup": 3},
    },
}
EXAMPLES = {"train": 24, "valid": 6}  # an epoch is 12 batches of two
FIFTY_STEPS = {"batch_size": 4, "iters": 50}


@pytest.mark.parametrize(
    "case", slow_except(CASES, "chat", reason="trains an epoch in both programs, in bfloat16")
)
@pytest.mark.parametrize(
    "length",
    [
        pytest.param({}, id="an_epoch"),
        pytest.param(FIFTY_STEPS, marks=pytest.mark.reliability, id="fifty_steps"),
    ],
)
def test_every_loss_and_weight_is_that_of_mlx_lm_lora(tmp_path, case, length) -> None:
    settings = SHARED | CASES[case] | length
    writers = {"chats": write_chats, "text": write_texts, "long-text": write_long_texts}
    write_data = writers[settings["data"]]
    settings["data"] = str(write_data(tmp_path / "data"))
    theirs = run_mlx_lm(settings | {"train": True, "adapter_path": str(tmp_path / "theirs")})
    ours = train_example(
        tmp_path / "ours",
        **settings,
        nested={"frequencies": [1]},
        training={"max_grad_norm": 0.0, "reference": "mlx_lm", "flat_loss_reports": 99},
    )
    for key in ("loss", "val_loss"):
        expected = [[n, loss] for name, n, loss in theirs if name == key]
        found = [[r["iteration"], r[key]] for r in ours.metrics() if r.get(key) is not None]
        assert found == expected
    before = read_tensors(tmp_path / "theirs" / "adapters.safetensors")
    assert read_tensors(ours.run.adapter / "adapters.safetensors") == before


def run_mlx_lm(settings: dict[str, Any]) -> list[Any]:
    """What mlx_lm.lora reported, in a process that has the BLAS that we have."""
    program = Path(settings["adapter_path"]).with_name("reference.py")
    program.write_text("from nested_core import backend\nbackend.prepare()\n" + REFERENCE)
    done = python(program, json.dumps(settings))
    assert done.returncode == 0, done.stderr
    reports: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return reports


def write_chats(folder: Path) -> Path:
    """The first of the example's chats."""
    folder.mkdir()
    for split, count in EXAMPLES.items():
        lines = (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return folder


def write_long_texts(folder: Path) -> Path:
    """Rows of more than 96 tokens."""
    return write_texts(folder, repeated=12)


def write_texts(folder: Path, repeated: int = 1) -> Path:
    """Plain text rows of different lengths, some with more keys than others."""
    folder.mkdir()
    for split, count in EXAMPLES.items():
        rows = [
            {"text": f"{split} {i}: " + "The capital of Fiji is Suva. " * (repeated + i % 5)}
            for i in range(count)
        ]
        for i, row in enumerate(rows):
            if i % 3 == 0:
                row["source"] = "table"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    return folder


def test_a_reference_run_refuses_what_mlx_lm_lora_does_not_do() -> None:
    values = {"training": {"reference": "mlx_lm", "max_grad_norm": 1.0, "warmup_steps": 3}}
    with pytest.raises(ConfigError, match=r"training\.max_grad_norm, training\.warmup_steps"):
        parse_config(values, source="a test")
    with pytest.raises(ConfigError, match="knows nothing of nested"):
        parse_config(
            {"training": {"reference": "mlx_lm"}, "nested": {"frequencies": [1, 2]}},
            source="a test",
        )
