"""A run that was promoted, judged by two suites and a file of examples."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from nested_core.config.sections import TaskSection
from nested_core.pipeline.finetune import finetune
from nested_core.records.verdict import Verdict
from nested_core.storage.run_directory import RunDirectory
from tests.example import DATA, example_config

CAPITALS = TaskSection(
    name="capitals", file=str(DATA / "held_out.jsonl"), score="contains", max_tokens=16
)
CURRENCIES = CAPITALS.model_copy(update={"name": "again"})
SUITES = (CAPITALS, CURRENCIES)


@dataclass(frozen=True)
class Judged:
    """A run that was promoted, and the same adapter in several forms."""

    folder: Path
    run: RunDirectory
    verdict: Verdict
    version: str

    @property
    def forms(self) -> dict[str, str]:
        """The adapter by form: a run, a champion, a version, mlx_lm's folder."""
        registry = self.folder / "registry" / "capitals"
        return {
            "run": str(self.run.path),
            "champion": str(registry),
            "version": f"{registry}@{self.version[:8]}",
            "mlx_lm": str(self.folder / "mlx_lm"),
        }


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """Twenty steps, judged by two suites and valid.jsonl."""
    folder = tmp_path_factory.mktemp("evaluation")
    config = example_config(
        num_layers=-1,
        iters=20,
        gate={"tasks": [suite.model_dump() for suite in SUITES]},
        registry={"path": str(folder / "registry"), "name": "capitals", "promote": "always"},
    )
    run = RunDirectory(folder / "run")
    run.path.mkdir()
    result = finetune(config, run)
    assert result.verdict is not None
    assert result.version is not None
    mlx_lm = Path(shutil.copytree(run.adapter, folder / "mlx_lm"))
    written = json.loads((mlx_lm / "adapter_config.json").read_bytes())
    del written["base_fingerprint"]  # mlx_lm.lora writes none
    (mlx_lm / "adapter_config.json").write_text(json.dumps(written))
    return Judged(folder, run, result.verdict, result.version)
