"""kill -9 of runs on preferences: `python -m tests.rooms.preferences.kills KILLS FOLDER`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tests.reliability.soak import run_kills  # first: it prepares the process for mlx

# isort: split
import yaml

from tests.reliability.kills import NAME, Command, KillSoak, comparable
from tests.rooms.preferences.pair_data import make_values, write_pairs

LIKELIHOODS = "run/rooms/preferences/reference-likelihoods.json"


class PreferenceKillSoak(KillSoak):
    """One command, a run that computes the likelihoods of its reference and trains on them."""

    def prepare(self) -> None:
        """Train without a kill, twice: the first run compiles the kernels, and is not timed."""
        values = make_values(
            write_pairs(self._folder / "data"),
            "dpo",
            save_every=3,
            steps_per_report=1,  # each step is read back, as a process does with its first ones
            nested={"frequencies": [1, 2]},
            gate={"max_kl": 100.0},  # bytes are compared: it moves by 4.1, and the default is 4
            registry={"path": "registry", "name": NAME, "promote": "always"},
            training={"loss": "dpo", "keep_checkpoints": 1000, "sample_tokens": 1},
        )
        (self._folder / "run.yaml").write_text(yaml.safe_dump(values))
        for name in ("first", "undisturbed"):
            scenario = self._new_scenario(name)
            began = time.monotonic()
            self._finish(*self._commands()[0].arguments, cwd=scenario)
            self._seconds["train"] = time.monotonic() - began
        self._expected = comparable(scenario)
        kept = json.loads(self._expected[LIKELIHOODS])
        assert kept["reference"] == "initial"
        assert kept["by_conversation"]

    def _commands(self) -> list[Command]:
        config = str(self._folder / "run.yaml")
        return [Command("train", ("train", "-c", config, "--run-dir", "run"))]


if __name__ == "__main__":
    kills, folder = sys.argv[1:]
    soak = f"{__spec__.name}:PreferenceKillSoak"
    print(run_kills(soak, Path(folder) / "kills", int(kills), seed=0))
