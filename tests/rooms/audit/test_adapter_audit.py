"""The audit of adapters from anywhere: twelve planted folders, and the command over all of them."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import pytest

from flows import cli
from nested_core.errors import ConfigError, DamagedError
from nested_core.models.base_model import fingerprint_base_model
from nested_core.rooms.audit.adapter_audit import (
    BaseModelForAudit,
    audit_adapter,
    audit_adapters,
    require_adapter,
)
from nested_core.storage.safetensors_files import load_arrays, save_arrays
from tests.builders.adapter_folders import Arrays, change_config, change_tensors, random_adapter
from tests.builders.rotten_files import rot
from tests.example import MODEL, train_example
from tests.left_out import slow_except
from tests.reliability.adapter_edits import REMOVED, VALUES
from tests.rooms.peft.adapters import peft_copy

WEIGHTS = "adapters.safetensors"
Q_PROJ = "model.layers.5.self_attn.q_proj"
TWO_KEYS = ["self_attn.q_proj", "mlp.up_proj"]


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
    nan: ("non_finite", f"1 tensor with NaN or infinity, {Q_PROJ}.lora_b"),
    wrong_base: ("base_mismatch", "is [48, 4] for [64, 4]"),
    missing_module: ("tensor_missing", "their modules do nothing"),
    inert_keys: (
        "config_mismatch",
        "keys that match no module within reach of the adapter: attn.c_attn",
    ),
    peft: (None, ""),
    dora: (None, ""),
    rescaled: (None, ""),
    fused_by_mistake: ("tensor_unexpected", "weights of the base or of a fused model"),
    truncated: ("unreadable", "is not a sound safetensors file"),
}


@pytest.fixture(scope="module")
def base() -> BaseModelForAudit:
    return BaseModelForAudit(str(MODEL))


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


@pytest.fixture(scope="module")
def document(planted: Path) -> dict[str, Any]:
    """What `verify --json` over all planted adapters prints; it exits with 4."""
    out = io.StringIO()
    with patch.object(sys, "__stdout__", out), warnings.catch_warnings():
        folders = map(str, sorted(planted.iterdir()))
        assert cli.main(["verify", *folders, "--model", str(MODEL), "--json"]) == 4
    return dict(json.loads(out.getvalue()))


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_each_planted_adapter_passes_or_fails_for_its_reason_in_one_document(
    plant: Callable[[Path], None], document: dict[str, Any]
) -> None:
    assert document["model"] == str(MODEL)
    rows = {Path(row["path"]).name: row for row in document["adapters"]}
    assert len(rows) == len(PLANTED) == 12
    code, message = PLANTED[plant]
    row = rows[plant.__name__]
    assert set(row) == {"path", "verdict", "reasons", "format", "modules", "logits"}
    assert row["verdict"] == ("passed" if code is None else "failed")
    assert [reason["code"] for reason in row["reasons"]] == ([] if code is None else [code])
    assert message in "".join(reason["message"] for reason in row["reasons"])
    if code is None:
        assert row["logits"]["max_abs_difference"] > row["logits"]["rounding"] > 0


@pytest.mark.slow("audits twelve adapters once more")
def test_the_table_has_a_row_an_adapter_at_80_columns(planted, capfd, monkeypatch) -> None:
    monkeypatch.setattr("flows.terminal.console.WIDTH_WITHOUT_TERMINAL", 80)
    code, out, _ = run_command(capfd, *sorted(planted.iterdir()), "--model", MODEL)
    assert code == 4
    assert max(map(len, out.splitlines())) <= 80
    words = [line.split() for line in out.splitlines()]
    verdicts = [word for line in words for word in line if word in ("passed", "failed")]
    assert (verdicts.count("passed"), verdicts.count("failed")) == (4, 8)
    for plant, (expected, _) in PLANTED.items():
        assert plant.__name__ in out
        assert expected is None or expected in out
    assert "docs/gate.md#one-adapter-alone" in out


def test_a_sound_adapter_alone_is_exit_0_with_its_modules(planted, capfd) -> None:
    code, out, _ = run_command(capfd, planted / "sound", "--model", MODEL)
    assert code == 0
    assert out.count("self_attn.q_proj") == 2
    assert out.splitlines()[-1].startswith("passed: 4 modules, logits move by ")


def test_one_damaged_adapter_is_exit_6_with_nothing_on_standard_output(planted, capfd) -> None:
    code, out, err = run_command(capfd, planted / "truncated", "--model", MODEL, "--json")
    assert (code, out) == (6, "")
    assert "is not a sound safetensors file" in err


def lora_setting(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["lora_parameters"].update(changes)


def drop_scale(config: dict[str, Any]) -> None:
    config["lora_parameters"]["alpha"] = config["lora_parameters"].pop("scale")


def drop_lora_b(tensors: Arrays) -> None:
    for name in [name for name in tensors if name.endswith("lora_b")]:
        del tensors[name]


def add_whole_model(tensors: Arrays) -> None:
    tensors |= load_arrays(MODEL / "model.safetensors")


def silence_one_module(tensors: Arrays) -> None:
    tensors[f"{Q_PROJ}.lora_a"] *= 0


CONFIG_EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str]] = {
    "rank": (lora_setting(rank=8), "config_mismatch", "is [64, 4] for [64, 8]"),
    "a thousand times the scale": (
        lora_setting(scale=2000.0),
        "config_mismatch",
        "more than 100 times their weight",
    ),
    "alpha for scale": (drop_scale, "unreadable", "Found 'alpha' instead"),
    "names of keys cut short": (
        lora_setting(keys=["q_proj", "up_proj"]),
        "config_mismatch",
        "q_proj, up_proj",
    ),
    "fewer layers": (
        lambda config: config.update(num_layers=1),
        "config_mismatch",
        "4 tensors of no module and type",
    ),
    "more layers": (
        lambda config: config.update(num_layers=6),
        "tensor_missing",
        "16 tensors called for",
    ),
    "another fingerprint": (
        lambda config: config.update(base_fingerprint="sha256:" + "0" * 64),
        "base_mismatch",
        "made for the base sha256:000000000000",
    ),
    "another type": (
        lambda config: config.update(fine_tune_type="full"),
        "base_mismatch",
        "8 tensors that the base has no weights for",
    ),
}
TENSOR_EDITS: dict[str, tuple[Callable[[Arrays], Any], str, str]] = {
    "one inert module": (silence_one_module, "no_effect", "1 modules change nothing"),
    "no lora_b": (drop_lora_b, "tensor_missing", "4 tensors called for"),
    "no tensor": (lambda tensors: tensors.clear(), "tensor_missing", "no tensor at all"),
    "the whole model saved": (
        add_whole_model,
        "tensor_unexpected",
        "56 tensors that are no LoRA factors",
    ),
    "too weak for any logit": (scale_lora_b(1e-3), "no_effect", "no logit of 4 fixed prompts"),
}


@pytest.mark.parametrize("edit", CONFIG_EDITS)
def test_a_configuration_that_does_not_fit_fails(edit, tmp_path, base) -> None:
    change, code, message = CONFIG_EDITS[edit]
    audit = audit_adapter(change_config(random_adapter(tmp_path / "a"), change), base)
    assert audit.reasons[0].code == code
    assert message in audit.summary()


@pytest.mark.parametrize("edit", TENSOR_EDITS)
def test_tensors_that_do_nothing_or_do_not_belong_fail(edit, tmp_path, base) -> None:
    change, code, message = TENSOR_EDITS[edit]
    audit = audit_adapter(change_tensors(random_adapter(tmp_path / "a"), change), base)
    assert [reason.code for reason in audit.reasons] == [code]
    assert message in audit.summary()


def peft_zero(tensors: Arrays) -> None:
    tensors.update({name: value * 0 for name, value in tensors.items()})


def peft_nan(tensors: Arrays) -> None:
    tensors[min(tensors)] *= float("nan")


def peft_of_a_narrower_base(tensors: Arrays) -> None:
    tensors.update({n: v[:, :48] if "lora_A" in n else v for n, v in tensors.items()})


def peft_without_a_module(tensors: Arrays) -> None:
    for name in sorted(tensors)[:2]:
        del tensors[name]


def test_a_peft_adapter_is_judged_as_mlx_lm_would_use_it(tmp_path, base) -> None:
    audit = audit_adapter(peft_copy(tmp_path / "a", change=peft_zero), base)
    assert (audit.format, [reason.code for reason in audit.reasons]) == ("peft", ["no_effect"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"change": peft_of_a_narrower_base}, "shape"),
        ({"change": peft_nan}, "holds values that are not finite"),
        ({"change": add_whole_model}, "no tensor of a LoRA module"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"change": peft_without_a_module}, "has no tensors"),
        ({"r": 8}, "rank 4, but adapter_config.json says 8"),
    ],
)
def test_a_peft_adapter_that_is_not_imported_is_unreadable(
    settings, message, tmp_path, base
) -> None:
    (audit, _) = audit_adapters(
        [peft_copy(tmp_path / "a", **settings), random_adapter(tmp_path / "b")],
        str(MODEL),
        lambda *_: None,
    )
    assert [reason.code for reason in audit.reasons] == ["unreadable"]
    assert message in audit.summary()


def test_a_base_that_rotted_since_its_hash_was_cached_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTED_TUNE_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(MODEL, tmp_path / "base"))
    recorded = fingerprint_base_model(folder)
    adapter = random_adapter(tmp_path / "a", base_fingerprint=recorded)
    assert audit_adapter(adapter, BaseModelForAudit(str(folder))).verdict == "passed"
    rot(folder / "model.safetensors", -1, monkeypatch)
    audit = audit_adapter(adapter, BaseModelForAudit(str(folder)))
    assert [reason.code for reason in audit.reasons] == ["base_mismatch"]


@pytest.mark.parametrize(("broken_rows", "prompts"), [([1], 3), ([1, 9, 17, 25], None)])
def test_a_prompt_that_the_base_cannot_answer_is_not_held_against_an_adapter(
    broken_rows: list[int], prompts: int | None, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "base"))
    weights = load_arrays(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][mx.array(broken_rows)] = float("nan")
    save_arrays(folder / "model.safetensors", weights)
    audit = audit_adapter(random_adapter(tmp_path / "a", model="x"), BaseModelForAudit(str(folder)))
    if prompts is None:
        assert [reason.code for reason in audit.reasons] == ["non_finite"]
        assert "the base is not sound" in audit.summary()
    else:
        assert audit.logits is not None
        assert (audit.reasons, audit.logits.prompts) == ([], prompts)


def test_a_fused_model_is_no_adapter(tmp_path: Path, base: BaseModelForAudit) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "fused"))
    audit = audit_adapter(folder, base)
    assert [reason.code for reason in audit.reasons] == ["tensor_unexpected"]
    assert "it was fused into its base" in audit.summary()


@pytest.mark.parametrize(
    "fine_tune_type", slow_except(["lora", "dora", "full"], "lora", reason="trains another run")
)
def test_a_run_passes_and_the_adapter_it_began_from_does_not(
    fine_tune_type: str, tmp_path: Path, base: BaseModelForAudit
) -> None:
    rate = 1e-4 if fine_tune_type == "full" else 2e-3
    run = train_example(tmp_path / "run", fine_tune_type=fine_tune_type, learning_rate=rate).run
    assert audit_adapter(run.adapter, base).reasons == []
    assert [reason.code for reason in audit_adapter(run.initial, base).reasons] == ["no_effect"]


def test_a_folder_of_adapters_is_none_and_is_told_how_to_give_all(tmp_path: Path) -> None:
    random_adapter(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"holds no adapter. .* For all in a folder give FOLDER/"):
        require_adapter(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "verify takes two adapters, INITIAL and TRAINED; given: 1. To audit"),
        (["none", "--model", str(MODEL)], "none holds no adapter"),
        ([str(MODEL), "--model", "no/where"], "'no/where' is no local directory"),
    ],
)
def test_bad_usage_is_exit_2(arguments, message, capfd) -> None:
    code, out, err = run_command(capfd, *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_hostile_name_steers_no_terminal(tmp_path, capfd) -> None:
    hostile = "\x1b[2J\u202ename"
    change_config(random_adapter(tmp_path / "keys"), lora_setting(keys=[*TWO_KEYS, hostile]))
    random_adapter(tmp_path / "sound\x1b[31m")
    code, out, err = run_command(capfd, *tmp_path.iterdir(), "--model", MODEL)
    assert code == 4
    assert "\\x1b[2J\\u202ename" in out.replace("\n", "")
    assert all(character.isprintable() or character == "\n" for character in out + err)


def set_value(path: tuple[str, ...], value: Any) -> Callable[[dict[str, Any]], None]:
    """Give a field, of a section perhaps, another value, or take it out."""

    def change(config: dict[str, Any]) -> None:
        *sections, key = path
        for section in sections:
            config = config[section]
        config.pop(key, None)
        if value is not REMOVED:
            config[key] = value

    return change


def config_edits() -> Iterator[tuple[Callable[[Path], Path], tuple[str, ...], Any]]:
    """Every field of both formats' configurations at each of many values that do not belong."""
    lora = [("lora_parameters", key) for key in ("rank", "scale", "dropout", "keys")]
    own: list[tuple[str, ...]] = [("fine_tune_type",), ("num_layers",), ("model",), *lora]
    others = ["r", "lora_alpha", "target_modules", "rank_pattern", "base_model_name_or_path"]
    for value in VALUES:
        yield from ((random_adapter, path, value) for path in [*own, ("lora_parameters",)])
        yield from ((peft_copy, (key,), value) for key in [*others, "use_dora", "peft_type"])


@pytest.mark.timeout(1800)
@pytest.mark.slow("audits many configurations")
@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.reliability)])
def test_any_value_in_a_configuration_is_an_audit_or_damage(every, tmp_path, base) -> None:
    for index, (make, path, value) in enumerate(list(config_edits())[::every]):
        folder = change_config(make(tmp_path / str(index)), set_value(path, value))
        with contextlib.suppress(DamagedError):
            assert audit_adapter(folder, base).verdict in ("passed", "failed")
