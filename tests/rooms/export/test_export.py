"""export: what stands, in folders and GGUFs of four families, and what of a broken one is seen."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from nested_core import export
from nested_core.backend import find_openblas
from nested_core.config.loading import parse_config
from nested_core.errors import ConfigError, DamagedError, GateRejected
from nested_core.measure.fresh_process.starting import start_reader
from nested_core.measure.losses.held_out_loss import read_held_out_examples
from nested_core.models.base_model import fingerprint_base_model, load_lazily
from nested_core.pipeline import steps
from nested_core.process.child import Child
from nested_core.rooms.export import exporting
from nested_core.rooms.export.asked import (
    TEXTS,
    Asked,
    HeldOutRows,
    Reading,
    has_llama_cpp,
    read_base_and_adapter,
    read_in_fresh_process,
)
from nested_core.rooms.export.export_record import read_export_record, record_place
from nested_core.rooms.export.exporting import NOT_RUN, publish
from nested_core.rooms.export.fusing import load_fused, write_model_folder
from nested_core.rooms.export.gguf import gguf_file
from nested_core.rooms.export.gguf.gguf_file import read_file_type, unpack_gguf, write_gguf
from nested_core.rooms.export.gguf.vocabulary import describe_vocabulary, digest_tokens
from nested_core.rooms.export.judgement import judge_reading
from nested_core.rooms.export.named_artefact import find_artefact
from nested_core.rooms.export.served_as import Program, place_for
from nested_core.storage.adapter import Adapter, read_adapter
from nested_core.storage.atomic import TEMPORARY_PREFIX
from nested_core.text.stages import receiving_stages
from tests.builders.adapter_folders import base_copy, change_config, change_tensors, random_adapter
from tests.builders.rotten_files import rot
from tests.example import DATA, example_config, prepare, train
from tests.left_out import needs_rooms, slow_except
from tests.rooms.export.small_bases import (
    FAMILIES,
    TEMPLATE,
    Trained,
    make_base,
    make_tokenizer,
    train_adapter,
)

pytestmark = pytest.mark.slow("writes whole models, and reads them back")

HELD_OUT = DATA / "valid.jsonl"
NEEDS_LLAMA_CPP = pytest.mark.skipif(
    not has_llama_cpp(), reason="llama.cpp is not here: pip install llama-cpp-python"
)


@pytest.fixture(autouse=True)
def quiet_writer() -> None:
    logging.getLogger("gguf").setLevel(logging.ERROR)


@pytest.mark.parametrize("family", slow_except(FAMILIES, "llama", reason="trains an adapter"))
def test_a_folder_keeps_the_gain(family, trained, tmp_path) -> None:
    done = export(trained(family).adapter, fused=tmp_path / "fused", data=HELD_OUT)
    record = done.record
    assert record is not None
    assert record == read_export_record(done.path)
    assert record.stands
    assert record.gain is not None
    assert record.gain.share is not None
    assert record.gain.share > 0.98
    assert record.gain.base - record.gain.adapter > 0.5
    assert record.weights == "bfloat16"
    assert record.texts == TEXTS + len(HELD_OUT.read_text().splitlines())
    assert f"loss {record.gain.exported:.4g} (adapter " in record.describe()
    assert done.upload_command == f"hf upload USER/NAME {tmp_path / 'fused'}"
    assert "# fused" in (done.path / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["fused"]


@needs_rooms("minutes")
def test_its_products_have_the_quicker_number_of_blas_threads(
    trained: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable, seen = "OPENBLAS_NUM_THREADS", []
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(
        "nested_core.rooms.minutes.blas_threads.choose_blas_threads", lambda model: 1
    )

    def noting_threads(*arguments: Any, **options: Any) -> Any:
        seen.append(os.environ.get(variable))
        return read_in_fresh_process(*arguments, **options)

    monkeypatch.setattr(exporting, "read_in_fresh_process", noting_threads)
    export(trained().adapter, fused=tmp_path / "fused", data=HELD_OUT)
    assert seen == [None if find_openblas() is None else "1"]
    assert variable not in os.environ


def test_what_is_asked_says_how_much_is_done(
    trained: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTED_TUNE_CACHE", str(tmp_path / "cache"))

    def has_answer(child: Child, _seconds: float) -> bool:
        return own(child, 0.01)

    own = Child.has_answer
    monkeypatch.setattr(Child, "has_answer", has_answer)
    told: list[str] = []
    with receiving_stages(told.append):
        export(trained().adapter, fused=tmp_path / "fused", data=HELD_OUT)
    asked = [re.fullmatch(r"asking (.*): (\d+) of (\d+) rows and questions", one) for one in told]
    shares = {(one[1], int(one[2]), int(one[3])) for one in asked if one is not None}
    for name in ("base", "adapter", "fused"):
        counts = {(done, count) for of, done, count in shares if of == name}
        assert {count for _, count in counts} == {len(HELD_OUT.read_text().splitlines())}
    assert 0 < max(done for _, done, _ in shares) <= len(HELD_OUT.read_text().splitlines())


def test_base_and_adapter_are_read_once_for_all_exports_of_an_adapter(
    trained: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTED_TUNE_CACHE", str(tmp_path / "cache"))
    started = []

    def counting(program: Path) -> Any:
        started.append(program)
        return start_reader(program)

    monkeypatch.setattr("nested_core.rooms.export.asked.start_reader", counting)

    def readers(name: str, adapter: Path, **given: Any) -> tuple[int, Any]:
        started.clear()
        record = export(adapter, fused=tmp_path / name, **{"data": HELD_OUT} | given).record
        assert record.gain is not None
        return len(started), (record.gain.base, record.gain.adapter)

    adapter = trained().adapter
    first, figures = readers("first", adapter)
    assert first == 2
    assert readers("second", adapter) == (1, figures)
    other = shutil.copytree(adapter, tmp_path / "other")
    change_tensors(other, lambda tensors: _scale_b(tensors, 0.5))
    count, others = readers("other-export", other)
    assert (count, others[0] == figures[0], others[1] == figures[1]) == (2, True, False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(HELD_OUT.read_text().splitlines(keepends=True)[:9]))
    assert readers("other-rows", adapter, data=rows)[0] == 2
    for entry in (tmp_path / "cache/answers").iterdir():
        entry.write_bytes(entry.read_bytes().replace(b"0", b"1", 1))
    assert readers("damaged", adapter) == (2, figures)


def test_a_damaged_record_beside_a_renamed_gguf_is_read_only_if_it_names_the_gguf(tmp_path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    stranger = tmp_path / "stranger.export.json"
    stranger.write_text("{")
    assert read_export_record(tmp_path / "model.gguf") is None
    stranger.write_text("{" + hashlib.sha256(b"GGUF").hexdigest())
    with pytest.raises(DamagedError, match=r"stranger\.export\.json"):
        read_export_record(tmp_path / "model.gguf")


@pytest.mark.slow("trains, exports and answers")
@pytest.mark.parametrize(
    "quantize", slow_except(["f16", "q8_0"], "q8_0", reason="exports a whole model")
)
@pytest.mark.parametrize("family", slow_except(FAMILIES, "gemma3_text", reason="trains an adapter"))
def test_a_gguf_keeps_the_gain(family, quantize, trained, tmp_path) -> None:
    file = tmp_path / "model.gguf"
    done = export(trained(family).adapter, gguf=file, quantize=quantize, data=HELD_OUT)
    record = done.record
    assert record is not None
    assert record == read_export_record(file)
    assert record.gain is not None
    assert record.gain.share is not None
    assert record.gain.share >= record.gain.needed == 0.95
    assert record.files == {"model.gguf": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert (NOT_RUN in record.notes) is (not has_llama_cpp())
    assert record.reader.startswith("llama.cpp" if has_llama_cpp() else "mlx_lm")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["model.export.json", "model.gguf"]


@pytest.mark.slow("trains an adapter on a base in 4 bits, and exports it three times")
def test_a_base_in_4_bits_is_kept_or_dequantized(trained, tmp_path) -> None:
    adapter = trained("llama", 4).adapter
    kept = export(adapter, fused=tmp_path / "kept", data=HELD_OUT).record
    larger = export(adapter, fused=tmp_path / "larger", dequantize=True, data=HELD_OUT).record
    gguf = export(adapter, gguf=tmp_path / "unpacked", data=HELD_OUT).record  # a name as any
    assert kept is not None
    assert larger is not None
    assert gguf is not None
    assert (kept.weights, kept.quantized_base) == ("quantized", "kept")
    assert (larger.weights, larger.quantized_base) == ("bfloat16", "dequantized")
    assert (gguf.weights, gguf.quantized_base) == ("f16", "dequantized")
    assert kept.gain is not None
    assert kept.gain.needed == 0.9
    assert "quantization" in json.loads((tmp_path / "kept/config.json").read_bytes())
    assert "quantization" not in json.loads((tmp_path / "larger/config.json").read_bytes())
    assert larger.logits.distance < kept.logits.distance


@pytest.mark.slow("trains an adapter on a base in 4 bits, and exports it twice")
def test_a_change_that_is_lost_in_4_bits_is_refused_and_kept_when_dequantized(
    trained: Callable[..., Trained], tmp_path: Path
) -> None:
    """What mlx_lm.fuse does to such an adapter without a word: mlx-lm's pull request 1564."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((DATA / f"{name}.jsonl").read_text() for name in ("train", "valid")))
    adapter = shutil.copytree(trained("llama", 4).adapter, tmp_path / "adapter")
    change_tensors(adapter, lambda tensors: _scale_b(tensors, 0.1))
    with pytest.raises(GateRejected, match="where 90% is asked for(.|\n)*With --dequantize"):
        export(adapter, fused=tmp_path / "v1.0", data=rows)
    refused = read_export_record(tmp_path / "v1.0.rejected")
    assert refused is not None
    assert refused.gain is not None
    assert refused.gain.base - refused.gain.adapter > 1
    assert (refused.gain.share or 1) < 0.8
    kept = export(adapter, fused=tmp_path / "v1.1", dequantize=True, data=rows).record
    assert kept is not None
    assert kept.gain is not None
    assert (kept.gain.share or 0) > 0.98


@pytest.mark.slow("exports a whole model")
def test_without_rows_the_logits_decide_and_the_export_says_so(trained, tmp_path) -> None:
    done = export(trained().adapter, fused=tmp_path / "fused")
    assert done.record.gain is None
    assert any("--data FILE" in note for note in done.record.notes)
    assert "logits within" in done.record.describe()


def test_what_does_not_stand_lies_under_another_name(trained, tmp_path) -> None:
    """A change so small that bfloat16 rounds it away when it is fused."""
    adapter = shutil.copytree(trained().adapter, tmp_path / "adapter")
    change_tensors(adapter, lambda tensors: _scale_b(tensors, 1e-5))
    with pytest.raises(GateRejected) as refused:
        export(adapter, fused=tmp_path / "out" / "fused", data=HELD_OUT)
    assert "of what the adapter changed" in str(refused.value)
    assert refused.value.exit_code == 4
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["fused.rejected"]
    record = read_export_record(tmp_path / "out/fused.rejected")
    assert record is not None
    assert not record.stands


def _scale_b(tensors: dict[str, mx.array], factor: float, *, but: str = "(none)") -> None:
    """Scale the factor B of each module whose name does not hold `but`."""
    for name, array in tensors.items():
        if name.endswith("lora_b") and but not in name:
            tensors[name] = array * factor


def test_another_family_is_refused_by_name_before_its_base_is_read(tmp_path: Path) -> None:
    base = base_copy(tmp_path / "base")
    adapter = random_adapter(tmp_path / "a", model=str(base))
    config = json.loads((base / "config.json").read_bytes())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "olmo2"}))
    (base / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="family olmo2, and GGUF is written for llama, mistral"):
        export(adapter, gguf=tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_base_that_rotted_since_its_hash_was_cached_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTED_TUNE_CACHE", str(tmp_path / "cache"))
    base = base_copy(tmp_path / "base")
    recorded = fingerprint_base_model(base)
    adapter = random_adapter(tmp_path / "a", model=str(base), base_fingerprint=recorded)
    rot(base / "model.safetensors", -1, monkeypatch)
    with pytest.raises(ConfigError, match="made for the base sha256:"):
        export(adapter, fused=tmp_path / "fused")


def test_a_place_that_is_taken_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "link.gguf").symlink_to("nowhere")
    for taken, why in (
        ("model.gguf", "exists already. Nothing is written over"),
        ("link.gguf", "no regular file, and nothing else is replaced. Give another name"),
        (".", "no regular file"),
    ):
        with pytest.raises(ConfigError, match=why):
            export("nothing", gguf=tmp_path / taken)
    with pytest.raises(ConfigError, match="one of --fused"):
        export("nothing")
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "link.gguf"}


# A fuse that was broken on purpose: what it makes, and what has to be said of it.


def _other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<|user|>", "User: ") + "\n")


def _other_tokenizer(folder: Path) -> None:
    make_tokenizer("qwen2").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


BROKEN_ADAPTERS = {
    "adapter left out": (partial(_scale_b, factor=0.0), "0% of what the adapter changed"),
    "scale twice": (partial(_scale_b, factor=2.0), "its logits are"),
    "one layer": (partial(_scale_b, factor=0.0, but=".layers.2."), "its logits are"),
}


def _no_system_text(folder: Path) -> None:
    template = TEMPLATE.replace("in messages", "in messages if message.role != 'system'")
    (folder / "chat_template.jinja").write_text(template)


BROKEN_FILES = {
    "no system text": (_no_system_text, "its chat template is another one"),
    "other template": (_other_template, "its chat template is another one"),
    "other tokenizer": (_other_tokenizer, "its tokenizer is another one"),
}
BROKEN = [*BROKEN_ADAPTERS, *BROKEN_FILES, "wrong base"]


def _choose_asked(source: Trained) -> Asked:
    values = {"model": str(source.base), "num_layers": -1, "gate": {"held_out": str(HELD_OUT)}}
    config = parse_config(values, source="test")
    held_out = read_held_out_examples(config, {})
    assert held_out is not None
    _, tokenizer, _ = load_lazily(source.base, trust_remote_code=False)
    rows = HeldOutRows.choose(held_out, config)
    asked = Asked(source.base, tokenizer, dtype="float32")
    return asked.about_rows(rows, continues=False)


def _break(how: str, source: Trained, folder: Path, *, dequantize: bool) -> Path:
    """A fused folder with one thing wrong."""
    base, adapter = source.base, shutil.copytree(source.adapter, folder / "adapter")
    if how in BROKEN_ADAPTERS:
        change_tensors(adapter, BROKEN_ADAPTERS[how][0])
    if how == "wrong base":
        bits = json.loads((base / "config.json").read_bytes()).get("quantization", {}).get("bits")
        base = make_base(folder / "wrong", "llama", seed=1, bits=bits)
    model, _, config = load_fused(base, read_adapter(adapter), dequantize=dequantize)
    write_model_folder(folder / "fused", base, model, config)
    if how in BROKEN_FILES:
        BROKEN_FILES[how][0](folder / "fused")
    return folder / "fused"


@dataclass(frozen=True)
class Measured:
    """What is asked of a base and its adapter, and what a fresh process read of them."""

    source: Trained
    asked: Asked
    read: tuple[Reading, Reading]

    def find_problems(self, artefact: Path, weights: Any) -> str:
        """What is said of an artefact."""
        reading = read_in_fresh_process(artefact, self.asked)
        own = digest_tokens(describe_vocabulary(self.asked.tokenizer, 0))
        findings = judge_reading(
            self.asked,
            (*self.read, reading),
            weights=weights,
            tokenizer=self.read[1].tokenizer if artefact.is_dir() else own,
        )
        return " ".join(findings.problems)


@pytest.fixture(scope="module")
def measured(trained: Callable[..., Trained]) -> Callable[..., Measured]:
    @cache
    def measure(bits: int | None) -> Measured:
        source = trained("llama", bits)
        asked = _choose_asked(source)
        return Measured(source, asked, read_base_and_adapter(asked, read_adapter(source.adapter)))

    return measure


@pytest.mark.parametrize(
    "bits", slow_except([None, 4], None, reason="trains an adapter on a base in 4 bits")
)
@pytest.mark.parametrize("how", slow_except(BROKEN, "one layer", reason="a process each"))
def test_a_folder_that_was_fused_wrong_is_seen(how, bits, measured, tmp_path) -> None:
    known = measured(bits)
    broken = _break(how, known.source, tmp_path, dequantize=False)
    problems = known.find_problems(broken, "quantized" if bits else "bfloat16")
    expected = {**BROKEN_ADAPTERS, **BROKEN_FILES}.get(how, (None, "its logits are"))[1]
    assert expected in problems


@NEEDS_LLAMA_CPP
@pytest.mark.slow("llama.cpp reads six files")
@pytest.mark.parametrize("how", BROKEN)
def test_a_gguf_of_what_was_fused_wrong_is_seen(how, measured, tmp_path) -> None:
    from mlx_lm import load

    known = measured(None)
    model, tokenizer = load(str(_break(how, known.source, tmp_path, dequantize=True)))[:2]
    file = tmp_path / "model.gguf"
    write_gguf(file, model, tokenizer, "q8_0", "broken")
    problems = known.find_problems(file, "q8_0")
    expected = {**BROKEN_ADAPTERS, **BROKEN_FILES}.get(how, (None, "its logits are"))[1]
    assert expected in problems or (how == "other tokenizer" and "token ids" in problems)


@NEEDS_LLAMA_CPP
@pytest.mark.slow("llama.cpp reads a base and an adapter")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_alone_does_in_llama_cpp_what_the_adapter_does(family, trained, tmp_path) -> None:
    done = export(trained(family).adapter, gguf_adapter=tmp_path / "lora.gguf", data=HELD_OUT)
    assert done.record.gain is not None
    assert done.record.gain.share is not None
    assert done.record.gain.share > 0.98
    assert done.record.notes[-1] == "asked on its base as a GGUF in f16"
    assert done.path.stat().st_size < 100_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.export.json", "lora.gguf"]


@NEEDS_LLAMA_CPP
@pytest.mark.slow("llama.cpp reads a base and a broken adapter")
@pytest.mark.parametrize("how", ["another scale", "rows of queries as mlx-lm has them"])
def test_a_lora_that_was_written_wrong_is_kept_out(how, trained, tmp_path, monkeypatch) -> None:
    if how == "another scale":
        known = Adapter.meaning
        monkeypatch.setattr(Adapter, "meaning", lambda own: known(own) | {"scale": 0.5})
    else:
        monkeypatch.setattr(gguf_file, "change_layout", lambda _, name, tensor, args: tensor)
    with pytest.raises(GateRejected, match=r"(its logits|its loss)"):
        export(trained().adapter, gguf_adapter=tmp_path / "lora.gguf", data=HELD_OUT)
    assert not (tmp_path / "lora.gguf").exists()


@NEEDS_LLAMA_CPP
@pytest.mark.slow("llama.cpp makes two files and reads them")
@pytest.mark.parametrize("quantize", ["q6_k", "q5_k_m", "q4_k_m"])
def test_few_bits_of_llama_cpp_keep_the_gain_and_say_what_they_cost(
    quantize, trained, tmp_path
) -> None:
    done = export(trained().adapter, gguf=tmp_path / "m.gguf", quantize=quantize, data=HELD_OUT)
    assert done.record.weights == quantize
    assert done.record.gain is not None
    assert done.record.gain.share is not None
    assert done.record.gain.share > 0.9
    assert f"the base alone as {quantize}, for what the bits cost: " in done.record.notes[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.export.json", "m.gguf"]


@NEEDS_LLAMA_CPP
@pytest.mark.slow("trains an adapter, and exports it twice")
def test_few_bits_that_lose_the_gain_are_kept_out(tmp_path) -> None:
    """One input of each matrix is large: in f16 nothing is lost, in few bits the others are."""
    base = make_base(tmp_path / "base", "llama", dtype=mx.float32)
    weights: Any = mx.load(str(base / "model.safetensors"))
    for name, array in weights.items():
        if name.rpartition(".")[0].endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            array[:, ::32] *= 512
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            array[::32] /= 512
    mx.save_safetensors(str(base / "model.safetensors"), weights, metadata={"format": "mlx"})
    adapter = train_adapter(base, tmp_path / "adapter")
    export(adapter, gguf=tmp_path / "f16.gguf", data=HELD_OUT)
    with pytest.raises(GateRejected, match="where 90% is asked for(.|\n)*what the bits cost: "):
        export(adapter, gguf=tmp_path / "m.gguf", quantize="q4_k_m", data=HELD_OUT)
    assert not (tmp_path / "m.gguf").exists()


@NEEDS_LLAMA_CPP
@pytest.mark.slow("llama.cpp reads two bases")
def test_a_lora_on_another_base_is_kept_out(trained, tmp_path) -> None:
    other = train_adapter(make_base(tmp_path / "other", "llama", seed=1), tmp_path / "its")
    export(other, gguf_adapter=tmp_path / "its.gguf", base_gguf=tmp_path / "b.gguf", data=HELD_OUT)
    before = (tmp_path / "b.gguf").read_bytes()
    with pytest.raises(GateRejected, match="its logits are"):
        export(
            trained().adapter,
            gguf_adapter=tmp_path / "m.gguf",
            base_gguf=tmp_path / "b.gguf",
            data=HELD_OUT,
        )
    assert not (tmp_path / "m.gguf").exists()
    assert (tmp_path / "b.gguf").read_bytes() == before


@NEEDS_LLAMA_CPP
@pytest.mark.slow("trains an adapter, and exports it")
@pytest.mark.parametrize("ends", [1, 3])
def test_a_token_that_ends_an_answer_and_is_left_out_is_seen(ends, tmp_path) -> None:
    """A GGUF names two at most; llama.cpp adds those whose text it knows."""
    base = make_base(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_bytes())
    texts = ["<|endoftext|>", "<|user|>", "<|assistant|>"][:ends]
    config["eos_token_id"] = make_tokenizer("llama").convert_tokens_to_ids(texts)
    (base / "config.json").write_text(json.dumps(config))
    adapter = train_adapter(base, tmp_path / "adapter")
    if ends == 1:
        assert export(adapter, gguf=tmp_path / "m.gguf", data=HELD_OUT).record.stands
        return
    with pytest.raises(GateRejected, match="1 tokens that end an answer do not end it there"):
        export(adapter, gguf=tmp_path / "m.gguf", data=HELD_OUT)


@pytest.mark.skipif(has_llama_cpp(), reason="llama.cpp is here")
@pytest.mark.parametrize(
    "asked", [{"gguf": "q4_k_m.gguf", "quantize": "q4_k_m"}, {"gguf_adapter": "lora.gguf"}]
)
def test_what_llama_cpp_makes_or_asks_is_refused_without_it(asked, tmp_path) -> None:
    places = {name: str(tmp_path / value) for name, value in asked.items() if "gguf" in name}
    with pytest.raises(ConfigError, match=r"llama\.cpp's own code, which is not here"):
        export(tmp_path, **(asked | places))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_s_file_has_the_factors_in_llama_cpp_s_layout(family, trained, tmp_path) -> None:
    from gguf import GGUFReader

    base, folder = trained(family).base, trained(family).adapter
    adapter = read_adapter(folder)
    gguf_file.write_gguf_adapter(tmp_path / "lora.gguf", load_lazily_alone(base), adapter, "a name")
    with pytest.raises(ConfigError, match="is a LoRA alone, which answers on its base"):
        find_artefact(str(tmp_path / "lora.gguf"), tmp_path / "unpacked")
    read = GGUFReader(tmp_path / "lora.gguf")
    stored = {tensor.name: tensor.data for tensor in read.tensors}
    assert len(stored) == len(adapter.tensors)
    assert read.fields["adapter.lora.alpha"].contents() == 2.0 * 4
    product = stored["blk.0.attn_q.weight.lora_b"] @ stored["blk.0.attn_q.weight.lora_a"]
    ours = adapter.to_mlx()
    module = "model.layers.0.self_attn.q_proj"
    change = (ours[f"{module}.lora_a"] @ ours[f"{module}.lora_b"]).T
    model, tokenizer, _ = load_fused(base, None, dequantize=True, dtype=mx.float32)
    fused = tmp_path / "changed.gguf"
    model.update(tree_unflatten([(f"{module}.weight", change)]))
    write_gguf(fused, model, tokenizer, "f16", "with the change alone")
    (expected,) = (t.data for t in GGUFReader(fused).tensors if t.name == "blk.0.attn_q.weight")
    assert np.abs(product - expected.astype(np.float32)).max() < 1e-3 * np.abs(product).max()


def test_what_a_lora_s_file_cannot_hold_is_refused(trained, tmp_path) -> None:
    base, folder = trained().base, trained().adapter
    dora = change_config(
        Path(shutil.copytree(folder, tmp_path / "dora")),
        lambda config: config.update(fine_tune_type="dora"),
    )
    with pytest.raises(ConfigError, match=r"applies LoRA alone, and this adapter is dora"):
        gguf_file.write_gguf_adapter(
            tmp_path / "lora.gguf", load_lazily_alone(base), read_adapter(dora), "a name"
        )


def load_lazily_alone(base: Path) -> Any:
    model, *_ = load_lazily(base, trust_remote_code=False)
    return model


def make_draft(folder: Path, name: str) -> Path:
    """An export before it is put in its place: a GGUF with its record, or a folder with it."""
    draft = folder / f"{TEMPORARY_PREFIX}draft" / name
    draft.parent.mkdir(parents=True)
    if not draft.suffix:
        draft.mkdir()
    for path in (draft if draft.suffix else draft / "model.safetensors", record_place(draft)):
        path.write_text("of the export")
    return draft


def publish_draft(folder: Path, name: str, *, stands: bool) -> str:
    """Put an export in its place in a folder; the name of that place."""
    draft = make_draft(folder, name)
    programs: list[Program] = ["ollama"] if draft.suffix else []
    for program in programs:
        place_for(program, draft).write_text("of the export")
    place = publish(draft, folder / name, programs, is_rejected=not stands)
    for program in programs:
        place_for(program, draft).unlink(missing_ok=True)
    draft.parent.rmdir()
    assert place.parent == folder
    return place.name


def test_a_rejected_gguf_lies_with_its_record_under_another_name(tmp_path: Path) -> None:
    """What is written lies in a folder of temporary files until it is judged."""
    assert publish_draft(tmp_path, "model.gguf", stands=False) == "model.rejected.gguf"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["model.rejected.export.json", "model.rejected.gguf"]


@pytest.mark.parametrize("name", ["model", "v1.0.gguf"])
def test_an_export_takes_the_first_free_name_and_writes_over_nothing(name, tmp_path) -> None:
    stem, ending = (name.removesuffix(".gguf"), ".gguf") if "gguf" in name else (name, "")
    (tmp_path / name).symlink_to("nowhere")  # it appeared while the export was measured
    for number in ("-2", "-3"):
        assert publish_draft(tmp_path, name, stands=True) == f"{stem}{number}{ending}"
    for number in ("", "-2", "-3"):
        rejected = publish_draft(tmp_path, name, stands=False)
        assert rejected == f"{stem}.rejected{number}{ending}"
    assert (tmp_path / name).is_symlink()


@pytest.mark.parametrize("taken", ["model.gguf", "model.export.json", "model.Modelfile"])
def test_each_file_of_a_gguf_that_is_a_persons_is_left_alone(taken: str, tmp_path: Path) -> None:
    (tmp_path / taken).write_text("of a person")
    with pytest.raises(ConfigError, match=f"{taken} exists already"):
        export("nothing", gguf=tmp_path / "model.gguf", programs=["ollama"])
    rejected = tmp_path / taken.replace("model", "model.rejected")
    rejected.write_text("of a person")
    assert publish_draft(tmp_path, "model.gguf", stands=True) == "model-2.gguf"
    assert publish_draft(tmp_path, "model.gguf", stands=False) == "model.rejected-2.gguf"
    assert (tmp_path / taken).read_text() == rejected.read_text() == "of a person"


@pytest.mark.parametrize("name", ["m.Modelfile", "m.MODELFILE"])
def test_a_gguf_named_as_what_is_written_beside_it_is_refused(name, tmp_path) -> None:
    with pytest.raises(ConfigError, match=f"{name} would be one"):
        export("nothing", gguf=tmp_path / name, programs=["ollama"])
    assert not list(tmp_path.iterdir())


def test_a_gguf_is_read_of_the_file_alone(trained: Callable[..., Trained], tmp_path: Path) -> None:
    from mlx_lm import load

    source = trained()
    model, tokenizer, _ = load_fused(source.base, read_adapter(source.adapter), dequantize=True)
    write_gguf(tmp_path / "model.gguf", model, tokenizer, "f16", "name")
    unpack_gguf(tmp_path / "model.gguf", tmp_path / "unpacked")
    read, its_tokenizer = load(str(tmp_path / "unpacked"))[:2]
    tokens = tokenizer.encode("I want to see Romania, 1234 times — naïve?")
    assert its_tokenizer.encode("I want to see Romania, 1234 times — naïve?") == tokens
    assert its_tokenizer.chat_template == TEMPLATE
    assert its_tokenizer.eos_token_ids == tokenizer.eos_token_ids
    mx.eval(model.parameters())
    found, expected = (each(mx.array([tokens])).astype(mx.float32) for each in (read, model))
    assert mx.abs(found - expected).max().item() < 0.1 * mx.abs(expected).max().item()  # type: ignore[operator]


def test_a_gguf_at_which_mlxs_reader_crashes_is_damaged(trained, tmp_path) -> None:
    """A key whose length is beyond the file: the process that reads it is ended by SIGSEGV."""
    source = trained()
    model, tokenizer, _ = load_fused(source.base, read_adapter(source.adapter), dequantize=True)
    file = tmp_path / "model.gguf"
    write_gguf(file, model, tokenizer, "f16", "name")
    content = file.read_bytes()
    key = content.index(b"general.name")  # its length, in 8 bytes, stands before it
    file.write_bytes(content[: key - 4] + b"\xff" * 4 + content[key:])
    with pytest.raises(DamagedError, match=r"model\.gguf is no sound GGUF: its reader ended"):
        unpack_gguf(file, tmp_path / "unpacked")


def test_a_gguf_of_a_million_keys_is_damaged_before_they_are_read(tmp_path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 10**6))
    for read in (read_file_type, partial(unpack_gguf, folder=tmp_path / "unpacked")):
        with pytest.raises(DamagedError, match="its header counts 1,000,000 keys"):
            read(file)


def test_a_base_whose_keys_hold_arrays_in_arrays_is_damaged(tmp_path) -> None:
    file = tmp_path / "base.gguf"
    key = struct.pack("<Q1sI", 1, b"a", 9)  # 9: an array
    file.write_bytes(
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key + struct.pack("<IQ", 9, 1) * 5000
    )
    with pytest.raises(DamagedError, match=r"base\.gguf is no sound GGUF"):
        read_file_type(file)


@pytest.mark.slow("exports")
@pytest.mark.parametrize(
    "is_judged", slow_except([True, False], False, reason="judges and exports a run")
)
def test_an_export_says_which_step_it_took_and_whether_that_was_judged(tmp_path, is_judged) -> None:
    config = example_config(iters=4, save_every=2, steps_per_eval=2, gate={"max_harmed_share": 1.0})
    finished = train(config, prepare(config, tmp_path / "run"))
    if is_judged:
        steps.judge(config, finished.run)
    else:
        shutil.rmtree(finished.run.adapter)
        finished.run.result.unlink()
    try:
        done = export(finished.run.path, fused=tmp_path / "fused")
        record, place = done.record, done.path
    except GateRejected:  # four steps gain next to nothing, which is not the subject
        place = tmp_path / "fused.rejected"
        record = read_export_record(place)
    assert record is not None
    assert record.step == 4
    passed = "step 4 of a run, which passed the gate"
    stopped = "step 4 of a run that was stopped, or trains still: it was not judged by the gate"
    assert record.notes[0] == (passed if is_judged else stopped)
    assert record.notes[0] in (place / "README.md").read_text()
