"""The audit of adapters from anywhere: twelve planted folders, and the command over all of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from flows import cli
from nested_core.errors import DamagedError
from nested_core.gate.adapter_audit import audit_adapter
from nested_core.gate.adapter_layout import AuditedBase
from nested_core.storage.safetensors_files import load_arrays, save_arrays
from tests.core.models.peft.adapters import peft_copy, random_adapter
from tests.example import MODEL

Arrays = dict[str, mx.array]
WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
Q_PROJ = "model.layers.5.self_attn.q_proj"
TWO_KEYS = ["self_attn.q_proj", "mlp.up_proj"]


def change_tensors(folder: Path, change: Callable[[Arrays], Any]) -> Path:
    """Write an adapter's tensors again, changed."""
    tensors = load_arrays(folder / WEIGHTS)
    change(tensors)
    save_arrays(folder / WEIGHTS, tensors)
    return folder


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Write adapter_config.json again, changed."""
    config = json.loads((folder / CONFIG).read_bytes())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def scale_lora_b(factor: float) -> Callable[[Arrays], None]:
    def change(tensors: Arrays) -> None:
        scaled = {n: v * factor for n, v in tensors.items() if n.endswith("lora_b")}
        tensors.update(scaled)

    return change


def drop_q_proj(tensors: Arrays) -> None:
    for leaf in ("lora_a", "lora_b"):
        del tensors[f"{Q_PROJ}.{leaf}"]


def sound(folder: Path) -> None:
    random_adapter(folder)


def zero(folder: Path) -> None:
    change_tensors(random_adapter(folder), scale_lora_b(0.0))


def near_zero(folder: Path) -> None:
    change_tensors(random_adapter(folder), scale_lora_b(1e-12))


def nan(folder: Path) -> None:
    def spoil(tensors: Arrays) -> None:
        tensors[f"{Q_PROJ}.lora_b"][0, 0] = float("nan")

    change_tensors(random_adapter(folder), spoil)


def wrong_base(folder: Path) -> None:
    """Of a model that is 48 wide where the example's is 64."""

    def narrow(tensors: Arrays) -> None:
        tensors.update({n: v[:48] if n.endswith("lora_a") else v for n, v in tensors.items()})

    change_tensors(random_adapter(folder), narrow)


def missing_module(folder: Path) -> None:
    change_tensors(random_adapter(folder), drop_q_proj)


def inert_keys(folder: Path) -> None:
    def add(config: dict[str, Any]) -> None:
        config["lora_parameters"]["keys"] = [*TWO_KEYS, "attn.c_attn"]

    change_config(random_adapter(folder), add)


def peft(folder: Path) -> None:
    peft_copy(folder)


def dora(folder: Path) -> None:
    random_adapter(folder, kind="dora")


def rescaled(folder: Path) -> None:
    """The same products, from factors and a scale of other sizes."""

    def strengthen(config: dict[str, Any]) -> None:
        config["lora_parameters"]["scale"] *= 1e-3

    def rescale(tensors: Arrays) -> None:
        factors = {"a": 1e5, "b": 1e-2}
        tensors.update({name: value * factors[name[-1]] for name, value in tensors.items()})

    change_config(change_tensors(random_adapter(folder), rescale), strengthen)


def fused_by_mistake(folder: Path) -> None:
    """The base's weights where the adapter's tensors should be."""
    random_adapter(folder)
    save_arrays(folder / WEIGHTS, load_arrays(MODEL / "model.safetensors"))


def truncated(folder: Path) -> None:
    path = random_adapter(folder) / WEIGHTS
    path.write_bytes(path.read_bytes()[:5000])


PLANTED: dict[Callable[[Path], None], tuple[str | None, str]] = {
    sound: (None, ""),
    zero: ("no_effect", "4 modules change nothing beyond the rounding of the base"),
    near_zero: ("no_effect", "4 modules change nothing beyond the rounding of the base"),
    nan: ("non_finite", f"1 tensors hold NaN or infinity, {Q_PROJ}.lora_b first"),
    wrong_base: ("base_mismatch", "is [48, 4] for [64, 4]"),
    missing_module: ("tensor_missing", "their modules do nothing"),
    inert_keys: ("config_mismatch", "1 keys match no module"),
    peft: (None, ""),
    dora: (None, ""),
    rescaled: (None, ""),
    fused_by_mistake: ("tensor_unexpected", "are weights of the base or of a fused model"),
    truncated: ("unreadable", "is not a sound safetensors file"),
}


@pytest.fixture(scope="module")
def base() -> AuditedBase:
    return AuditedBase(str(MODEL))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each of the planted adapters."""
    folder = tmp_path_factory.mktemp("planted")
    for plant in PLANTED:
        plant(folder / plant.__name__)
    return folder


def run_command(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `verify`, called in this process."""
    with warnings.catch_warnings():
        code = cli.main(["verify", *map(str, arguments)])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_each_planted_adapter_passes_or_fails_for_its_reason(
    plant: Callable[[Path], None], planted: Path, base: AuditedBase
) -> None:
    code, message = PLANTED[plant]
    if plant is truncated:
        with pytest.raises(DamagedError, match=message):
            audit_adapter(planted / plant.__name__, base)
        return
    audit = audit_adapter(planted / plant.__name__, base)
    assert [reason.code for reason in audit.reasons] == ([] if code is None else [code])
    assert message in audit.summary()
    if code is None:
        assert audit.logits is not None
        assert audit.logits.max_abs_difference > audit.logits.rounding > 0


def test_the_command_over_the_folder_gives_one_document(
    planted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_command(capfd, planted, "--model", MODEL, "--json")
    assert code == 4
    rows = {Path(row["path"]).name: row for row in json.loads(out)["adapters"]}
    assert len(rows) == len(PLANTED) == 12
    for plant, (expected, message) in PLANTED.items():
        row = rows[plant.__name__]
        assert row["verdict"] == ("passed" if expected is None else "failed")
        assert [r["code"] for r in row["reasons"]] == ([] if expected is None else [expected])
        assert message in "".join(r["message"] for r in row["reasons"])


def test_the_table_has_a_row_an_adapter_at_80_columns(
    planted: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.terminal.WIDTH_WITHOUT_TERMINAL", 80)
    code, out, _ = run_command(capfd, planted, "--model", MODEL)
    assert code == 4
    assert max(map(len, out.splitlines())) <= 80
    words = [line.split() for line in out.splitlines()]
    verdicts = [word for line in words for word in line if word in ("passed", "failed")]
    assert (verdicts.count("passed"), verdicts.count("failed")) == (4, 8)
    for plant, (expected, _) in PLANTED.items():
        assert plant.__name__ in out
        assert expected is None or expected in out
    assert "docs/gate.md#one-adapter-alone" in out


def test_a_sound_adapter_alone_is_exit_0_with_its_modules(
    planted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run_command(capfd, planted / "sound", "--model", MODEL)
    assert code == 0
    assert out.count("self_attn.q_proj") == 2
    assert out.splitlines()[-1].startswith("passed: 4 modules, logits move by ")


def test_one_damaged_adapter_is_exit_6_with_nothing_on_standard_output(
    planted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_command(capfd, planted / "truncated", "--model", MODEL, "--json")
    assert (code, out) == (6, "")
    assert "is not a sound safetensors file" in err
