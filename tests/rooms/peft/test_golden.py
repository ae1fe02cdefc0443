"""Import and export against PEFT itself: its own files, and the logits that PyTorch gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from nested_core.gate.judge import verify_adapters
from nested_core.rooms.peft import export_peft, import_peft
from nested_core.storage.adapter import read_adapter
from nested_core.storage.safetensors_files import load_arrays
from tests.builders.adapter_folders import random_adapter
from tests.example import MODEL
from tests.rooms.peft.adapters import mlx_logits, same_bytes
from tests.rooms.peft.make_golden import CASES, GOLDEN, TOKENS

SCRIPT = GOLDEN.with_name("make_golden.py")
PYTHON = os.environ.get("PEFT_PYTHON", sys.executable)  # one that has torch and peft
HAS_PEFT = subprocess.run([PYTHON, "-c", "import torch, peft"], capture_output=True).returncode == 0
# Float32 sums in another order: 1.3e-5 was the most seen, with logits of up to 15.
TOLERANCE = 5e-5


def golden_logits(case: str) -> np.ndarray:
    return np.array(load_arrays(GOLDEN / case / "logits.safetensors")["logits"])


def test_every_case_of_the_script_is_there_with_logits_of_its_tokens() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == CASES.keys()
    assert {golden_logits(case).shape for case in CASES} == {(len(TOKENS), 1588)}


@pytest.mark.parametrize("case", CASES)
def test_an_imported_adapter_gives_the_logits_that_peft_gives(case: str, tmp_path: Path) -> None:
    import_peft(GOLDEN / case, tmp_path / "out", str(MODEL))
    expected = golden_logits(case)
    assert np.abs(mlx_logits() - expected).max() > 3
    assert np.abs(mlx_logits(tmp_path / "out") - expected).max() < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_export_writes_the_very_tensors_that_peft_wrote(case: str, tmp_path: Path) -> None:
    import_peft(GOLDEN / case, tmp_path / "mlx", str(MODEL))
    export_peft(tmp_path / "mlx", tmp_path / "peft")
    name = "adapter_model.safetensors"
    assert same_bytes(load_arrays(tmp_path / "peft" / name), load_arrays(GOLDEN / case / name))
    ours, theirs = (
        json.loads((folder / "adapter_config.json").read_bytes())
        for folder in (tmp_path / "peft", GOLDEN / case)
    )
    assert ours.keys() <= theirs.keys()
    for key in ("r", "lora_dropout", "peft_type", "task_type", "bias"):
        assert ours[key] == theirs[key]
    if not theirs["use_rslora"]:
        assert ours["lora_alpha"] == theirs["lora_alpha"]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_export_and_import_again_keep_every_bit(dtype: mx.Dtype, tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter", dtype=dtype, scale=0.3, rank=3)
    export_peft(adapter, tmp_path / "peft")
    import_peft(tmp_path / "peft", tmp_path / "again", str(MODEL))
    before, after = read_adapter(adapter), read_adapter(tmp_path / "again")
    assert after.tensors == before.tensors
    fingerprint = after.config["base_fingerprint"]
    assert after.meaning() == before.meaning() | {"base_fingerprint": fingerprint}


def test_the_gate_judges_an_imported_adapter(tmp_path: Path) -> None:
    import_peft(GOLDEN / "lora", tmp_path / "a", str(MODEL))
    import_peft(GOLDEN / "lora", tmp_path / "b", str(MODEL))
    verdict = verify_adapters(tmp_path / "a", tmp_path / "b")
    assert [reason.code for reason in verdict.reasons] == ["unchanged"]


@pytest.mark.skipif(not HAS_PEFT, reason="torch and peft are not installed: set PEFT_PYTHON")
class TestWithPeft:
    """What the golden files stand for, made again with the PEFT that is installed."""

    def logits(self, adapter: Path, out: Path) -> np.ndarray:
        command = [PYTHON, str(SCRIPT), "logits", str(adapter), str(out)]
        subprocess.run(command, check=True, capture_output=True, timeout=110)
        return np.array(load_arrays(out)["logits"])

    @pytest.mark.parametrize("case", CASES)
    def test_peft_still_gives_the_golden_logits(self, case: str, tmp_path: Path) -> None:
        found = self.logits(GOLDEN / case, tmp_path / "logits.safetensors")
        assert np.abs(found - golden_logits(case)).max() < TOLERANCE

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"dtype": mx.bfloat16, "num_layers": 6},
            {"scale": 3.1, "rank": 3, "keys": ["model.layers.1.mlp.down_proj", "mlp.gate_proj"]},
        ],
        ids=["lora", "bfloat16", "uneven"],
    )
    def test_an_exported_adapter_gives_the_logits_that_mlx_lm_gives(
        self, settings: dict, tmp_path: Path
    ) -> None:
        adapter = random_adapter(tmp_path / "adapter", **settings)
        export_peft(adapter, tmp_path / "peft")
        expected = mlx_logits(adapter)
        found = self.logits(tmp_path / "peft", tmp_path / "logits.safetensors")
        assert np.abs(mlx_logits() - expected).max() > 1
        assert np.abs(found - expected).max() < TOLERANCE
