"""Models in formats that other rooms read, evaluated as the adapter that they were made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from nested_core.data.example_digests import decode_digests
from nested_core.errors import ConfigError, DamagedError
from nested_core.pipeline.named_models import find_rows_of_base
from nested_core.rooms.evaluate.evaluating import evaluate
from nested_core.storage.adapter import read_adapter
from nested_core.storage.untrusted_files import regular_sha256
from tests.example import DATA, MODEL, example_config
from tests.rooms.evaluate.conftest import CAPITALS, Judged

pytest.importorskip("nested_core.rooms.export", reason="the room export is not there")
from nested_core.rooms.export.asked import has_llama_cpp
from nested_core.rooms.export.exporting import export
from nested_core.rooms.export.fusing import load_fused
from nested_core.rooms.export.gguf.gguf_file import write_gguf
from nested_core.rooms.export.named_artefact import find_artefact

pytestmark = pytest.mark.slow("exports runs, and judges the files")


@pytest.fixture(scope="module")
def exported(judged: Judged) -> Path:
    """The adapter fused into its base, in a folder."""
    export(judged.run.path, fused=judged.folder / "fused")
    return judged.folder / "fused"


@pytest.fixture(scope="module")
def gguf(judged: Judged, exported: Path) -> Path:
    """The same adapter in a GGUF, with the record that an export lays beside it."""
    model, tokenizer, _ = load_fused(
        MODEL, read_adapter(judged.run.adapter), dequantize=True, dtype=mx.float32
    )
    write_gguf(judged.folder / "model.gguf", model, tokenizer, "f16", "model")
    record = json.loads((exported / "export.json").read_bytes())
    files = {"written.gguf": regular_sha256(judged.folder / "model.gguf")}
    record |= {"artefact": "gguf", "weights": "f16", "files": files}
    (judged.folder / "model.export.json").write_text(json.dumps(record))
    return judged.folder / "model.gguf"


@pytest.mark.slow("loads what was exported, and its base")
def test_what_was_exported_is_compared_with_the_base_that_it_was_made_of(
    judged: Judged, exported: Path, gguf: Path
) -> None:
    found = evaluate([exported, gguf], suites=[CAPITALS], data=DATA / "valid.jsonl")
    base, *others = found.models
    (task, _), validation = judged.verdict.tasks, judged.verdict.validation
    assert validation is not None
    assert base.suites[0].score == task.base
    for model in others:
        assert model.suites[0].score == task.candidate
        assert model.loss is not None
        assert model.loss.conclusion == "better"
    first = found.answers[0]
    assert first.answers[str(exported)] == first.answers[str(gguf)] != first.answers["base"]


def test_an_export_whose_base_is_another_one_now_is_refused(exported: Path, tmp_path: Path) -> None:
    fused = Path(shutil.copytree(exported, tmp_path / "fused"))
    record = json.loads((fused / "export.json").read_bytes())
    record["base_fingerprint"] = f"sha256:{'0' * 64}"
    (fused / "export.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="made for the base sha256:000000000000, and .* holds"):
        evaluate([fused], suites=[CAPITALS])
    (fused / "export.json").write_text("{}")
    with pytest.raises(DamagedError, match="export.json: artefact: Field required"):
        evaluate([fused], suites=[CAPITALS])


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "model-2.safetensors"])
def test_an_export_with_other_files_than_its_record_has_is_refused(
    name: str, exported: Path, tmp_path: Path
) -> None:
    fused = Path(shutil.copytree(exported, tmp_path / "fused"))
    assert find_rows_of_base(fused).unknown is None
    shutil.copy(MODEL / name.replace("-2", ""), fused / name)
    with (fused / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(
        DamagedError, match=rf"fused is not what .*export\.json .*: {name}\. Export"
    ):
        evaluate([fused], suites=[CAPITALS])
    with pytest.raises(DamagedError, match="is not what"):
        find_rows_of_base(fused)
    (fused / name).unlink()
    if name != "model-2.safetensors":
        with pytest.raises(DamagedError, match=f"Missing, or other than exported: {name}"):
            find_rows_of_base(fused)


def test_a_gguf_without_its_record_is_compared_with_no_base_but_one_that_is_given(
    judged: Judged, gguf: Path, tmp_path: Path
) -> None:
    alone = str(shutil.copy(gguf, tmp_path / "alone.gguf"))
    assert "nothing is compared" in str(evaluate([alone], data=DATA / "valid.jsonl").describe())
    found = evaluate([alone], data=DATA / "valid.jsonl", base_model=str(MODEL))
    base, other = (model.loss for model in found.models)
    assert base is not None
    assert other is not None
    assert base.loss_after != other.loss_after


def test_a_gguf_with_the_record_of_another_is_refused(gguf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    shutil.copy(gguf, other)
    shutil.copy(gguf.with_name("model.export.json"), tmp_path / "other.export.json")
    assert find_artefact(str(other), tmp_path / "first") is not None  # under another name
    with other.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DamagedError, match=r"other\.gguf is not what .*other\.export\.json"):
        find_artefact(str(other), tmp_path / "second")


def test_a_renamed_gguf_has_the_record_of_its_content_beside_it(gguf: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "other.gguf"
    shutil.copy(gguf, renamed)
    record = json.loads(gguf.with_name("model.export.json").read_bytes())
    another = record | {"files": {"a.gguf": "0" * 64}, "base": "another"}
    (tmp_path / "a.export.json").write_text(json.dumps(another))
    unknown = find_artefact(str(renamed), tmp_path / "first")
    assert unknown is not None
    assert (unknown.made_of, unknown.seen.unknown is None) == (None, False)
    (tmp_path / "model.export.json").write_text(json.dumps(record))
    found = find_artefact(str(renamed), tmp_path / "second")
    assert found is not None
    assert found.made_of is not None
    assert found.made_of.base == record["base"]
    expected = decode_digests(record["trained_on"]["training_examples"])
    assert found.seen.digests.tolist() == expected.tolist() != []


def test_a_gguf_that_is_not_understood_is_refused_by_name(gguf: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:1000])
    with pytest.raises(DamagedError, match=r"broken\.gguf is no sound GGUF"):
        evaluate([broken], suites=[CAPITALS])
    other = tmp_path / "other.gguf"
    other.write_bytes(gguf.read_bytes().replace(b"llama", b"mamba"))
    with pytest.raises(
        ConfigError, match=r"other\.gguf holds .* architecture mamba; read are llama"
    ):
        evaluate([other], suites=[CAPITALS])


@pytest.mark.slow("exports and evaluates")
def test_peft_and_exported_folders_have_the_figures_of_the_verdict(
    judged: Judged, exported: Path, tmp_path: Path
) -> None:
    peft_room = pytest.importorskip("nested_core.rooms.peft", reason="the room peft is not there")
    peft_room.export_peft(judged.run.adapter, tmp_path / "peft", str(MODEL))
    models = [tmp_path / "peft", exported]
    asked: Any = {"suites": [CAPITALS], "data": DATA / "valid.jsonl"}
    found = evaluate(models, **asked, config=example_config())
    _, peft, fused = found.models
    task, validation = judged.verdict.tasks[0], judged.verdict.validation
    assert validation is not None
    assert peft.loss is not None
    assert fused.loss is not None
    assert [model.suites[0].score for model in (peft, fused)] == [task.candidate] * 2
    assert peft.loss.loss_after == validation.loss_after
    assert fused.loss.loss_after == pytest.approx(validation.loss_after, rel=5e-3)  # bfloat16


@pytest.mark.slow("exports and evaluates")
def test_what_an_export_was_trained_on_is_left_out_or_said_to_be_unknown(
    exported: Path, tmp_path: Path
) -> None:
    data = tmp_path / "mixed.jsonl"
    trained = (DATA / "train.jsonl").read_text().splitlines()[:3]
    data.write_text("\n".join([*trained, (DATA / "valid.jsonl").read_text()]))
    found = evaluate([exported], data=data)
    assert found.unknown == ()
    loss = found.models[1].loss
    assert loss is not None
    assert (loss.examples, loss.left_out) == (10, 3)
    forgetful = shutil.copytree(exported, tmp_path / "forgetful")
    record = json.loads((forgetful / "export.json").read_text())
    (forgetful / "export.json").write_text(json.dumps(record | {"trained_on": {}}))
    found = evaluate([forgetful], data=data)
    assert found.unknown == (str(forgetful),)
    base, other = (model.loss for model in found.models)
    assert base is not None
    assert other is not None
    assert (base.left_out, other.left_out) == (0, None)


def test_a_peft_export_knows_what_its_run_was_trained_on(judged: Judged, tmp_path: Path) -> None:
    peft_room = pytest.importorskip("nested_core.rooms.peft", reason="the room peft is not there")
    data = tmp_path / "mixed.jsonl"
    trained = (DATA / "train.jsonl").read_text().splitlines()[:3]
    data.write_text("\n".join([*trained, (DATA / "valid.jsonl").read_text()]))
    for name, source in (
        ("run", judged.run.adapter),
        ("version", judged.folder / "registry" / "capitals" / "champion"),
    ):
        peft_room.export_peft(source, tmp_path / name, str(MODEL))
        found = evaluate([tmp_path / name], data=data)
        assert found.unknown == ()
        loss = found.models[1].loss
        assert loss is not None
        assert (loss.examples, loss.left_out) == (10, 3)


NEEDS_LLAMA_CPP = pytest.mark.skipif(not has_llama_cpp(), reason="llama.cpp is not here")


@NEEDS_LLAMA_CPP
@pytest.mark.slow("exports in 4 bits, and loads the base")
def test_a_gguf_is_asked_in_llama_cpp(judged: Judged, tmp_path: Path) -> None:
    few_bits = tmp_path / "model.gguf"
    export(judged.run.path, gguf=few_bits, quantize="q4_k_m")
    found = evaluate([few_bits, judged.run.path], suites=[CAPITALS], program="llama.cpp")
    base, asked, adapter = found.models
    assert asked.name.startswith(f"{few_bits} in llama.cpp (llama-cpp-python ")
    assert abs(asked.suites[0].score - adapter.suites[0].score) < 0.1
    assert asked.suites[0].score > base.suites[0].score
    with pytest.raises(ConfigError, match="a format that MLX does not read"):
        evaluate([few_bits], suites=[CAPITALS])
    few_bits.with_name("model.export.json").unlink()
    with pytest.raises(ConfigError, match="no record of an export lies beside model"):
        evaluate([few_bits], suites=[CAPITALS], program="llama.cpp")


@NEEDS_LLAMA_CPP
def test_a_program_that_has_nothing_to_answer_is_refused(gguf: Path) -> None:
    with pytest.raises(ConfigError, match=r"--in llama\.cpp is for GGUFs, and none is given"):
        evaluate([MODEL], suites=[CAPITALS], program="llama.cpp")
    with pytest.raises(ConfigError, match="losses are measured in MLX"):
        evaluate([gguf], data=DATA / "valid.jsonl", program="llama.cpp")
