"""Which base model a folder holds: what is told apart, and what is not looked at."""

from __future__ import annotations

import inspect
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils._validators import validate_repo_id
from mlx_lm.utils import _download

from nested_core.errors import ConfigError, DamagedError
from nested_core.models.base_model import (
    FINGERPRINT_PREFIX,
    chat_template_digest,
    context_length,
    find_model_folder,
    find_model_folder_offline,
    fingerprint_base_model,
    fingerprint_tokenizer,
    has_two_templates,
    is_same_base,
    load_base_model,
    load_lazily,
    require_folder_or_hub_name,
    vocabulary_digest,
    write_used_template,
)
from tests.builders.adapter_folders import base_copy
from tests.builders.rotten_files import rot
from tests.example import example_config

FILES = {
    "config.json": b"{" + b" " * 12_000 + b"}",
    "own_model.py": b"# code\n" * 4_000,
    "model.safetensors": bytes(2 * 2**20),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def change(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("config.json", 0),
        ("config.json", 8_193),
        ("own_model.py", 0),
        ("own_model.py", 4_097),
        ("own_model.py", -1),
        ("model.safetensors", 0),
        ("model.safetensors", 2**20),
        ("model.safetensors", 4_101),
        ("model.safetensors", 2 * 2**20 - 1),
    ],
)
def test_another_byte_is_another_base(folder: Path, name: str, at: int) -> None:
    before = fingerprint_base_model(folder)
    change(folder / name, at)
    assert fingerprint_base_model(folder) != before
    change(folder / name, at)
    assert fingerprint_base_model(folder) == before


def test_rotten_bytes_are_another_base_once_all_bytes_are_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTED_TUNE_CACHE", str(tmp_path / "cache"))
    before = fingerprint_base_model(folder)
    rot(folder / "model.safetensors", 5_000, monkeypatch)
    assert fingerprint_base_model(folder) == before  # a cached hash is believed
    assert fingerprint_base_model(folder, max_age=0) != before
    assert fingerprint_base_model(folder) != before


def test_code_or_weights_that_come_or_go_are_another_base(folder: Path) -> None:
    before = fingerprint_base_model(folder)
    (folder / "more.py").write_bytes(b"")
    with_more = fingerprint_base_model(folder)
    assert with_more != before
    (folder / "more.py").rename(folder / "model-2.safetensors")
    assert fingerprint_base_model(folder) not in (before, with_more)


@pytest.mark.parametrize(
    "do", [fingerprint_base_model, partial(load_lazily, trust_remote_code=False)]
)
def test_a_tensor_in_two_files_is_refused_as_either_could_be_taken(do, tmp_path: Path) -> None:
    """mlx_lm takes the later file in the folder's order, which a copy may change."""
    base = base_copy(tmp_path / "base")
    shutil.copy(base / "model.safetensors", base / "model-old.safetensors")
    with pytest.raises(ConfigError, match=r"in model-old\.safetensors and in model\.safetensors"):
        do(base)
    (base / "model-old.safetensors").rename(base / "old-model.safetensors")  # not mlx_lm's
    do(base)


def test_what_a_model_is_not_made_of_is_not_looked_at(folder: Path) -> None:
    before = fingerprint_base_model(folder)
    (folder / "README.md").write_text("words")
    assert fingerprint_base_model(folder) == before


def test_mlx_lm_still_resolves_a_local_folder_through_the_private_function_used_here(
    tmp_path: Path,
) -> None:
    parameters = list(inspect.signature(_download).parameters.values())
    assert parameters[0].name == "path_or_hf_repo"
    assert all(each.default is not inspect.Parameter.empty for each in parameters[1:])
    assert find_model_folder(str(tmp_path)) == Path(_download(str(tmp_path))) == tmp_path


def test_the_fingerprint_names_its_rule(folder: Path) -> None:
    rule, digest = (
        fingerprint_base_model(folder)[: len(FINGERPRINT_PREFIX)],
        fingerprint_base_model(folder)[len(FINGERPRINT_PREFIX) :],
    )
    assert rule == "sha256:"
    assert len(bytes.fromhex(digest)) == 32


def test_files_that_are_links_as_in_the_hubs_cache_give_the_same_fingerprint(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    snapshot = tmp_path_factory.mktemp("snapshot")
    for name in FILES:
        (snapshot / name).symlink_to(folder / name)
    assert fingerprint_base_model(snapshot) == fingerprint_base_model(folder)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
    ],
)
def test_a_tokenizer_is_the_same_by_its_files_whatever_the_weights(folder: Path, name: str) -> None:
    before = fingerprint_tokenizer(folder)
    change(folder / "model.safetensors", 0)
    assert fingerprint_tokenizer(folder) == before
    with (folder / name).open("a") as file:
        file.write(" ")
    assert fingerprint_tokenizer(folder) != before


def test_tokenizer_json_decides_alone_which_tokens_a_text_is_cut_into(folder: Path) -> None:
    assert vocabulary_digest(folder) is None
    (folder / "tokenizer.json").write_text("{}")
    before = vocabulary_digest(folder)
    (folder / "merges.txt").write_text("a b")
    (folder / "generation_config.json").write_text("{}")
    assert vocabulary_digest(folder) == before
    with (folder / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert vocabulary_digest(folder) != before
    (folder / "tokenizer.json").unlink()
    of_merges = vocabulary_digest(folder)
    (folder / "merges.txt").write_text("b a")
    assert vocabulary_digest(folder) not in {of_merges, before}


def test_a_base_is_the_same_by_its_files_alone(folder: Path) -> None:
    recorded = fingerprint_base_model(folder)
    assert is_same_base(recorded, folder)
    change(folder / "model.safetensors", 0)
    assert not is_same_base(recorded, folder)


@pytest.mark.parametrize("recorded", ["0548024", "crc32:00", ""])
def test_a_fingerprint_by_another_rule_is_damage(folder: Path, recorded: str) -> None:
    with pytest.raises(DamagedError, match="begin with sha256:"):
        is_same_base(recorded, folder)


def test_a_model_that_is_not_on_this_machine_is_not_fetched(tmp_path: Path) -> None:
    assert find_model_folder_offline(str(tmp_path)) == tmp_path
    assert find_model_folder_offline("nobody/no-such-model") is None
    assert find_model_folder_offline("../not/a/hub/name") is None


@pytest.mark.parametrize("name", ["gpt2", "mlx-community/Qwen3-0.6B-4bit", "_ann/_model"])
def test_what_the_hub_can_have_is_asked_for_there(name: str) -> None:
    validate_repo_id(name)
    require_folder_or_hub_name(name)


@pytest.mark.parametrize("name", ["-ann/model", "./model", "a/b/c", "ann/"])
def test_what_no_repository_is_called_is_no_folder_here(name: str) -> None:
    with pytest.raises(ConfigError, match="is no local directory: .* does not exist"):
        require_folder_or_hub_name(name)


@pytest.mark.claim(
    "Data, adapters and model folders can run nothing here, but code that your file trusts"
)
def test_code_in_a_models_folder_is_run_only_where_the_configuration_trusts_it(tmp_path) -> None:
    model = base_copy(tmp_path / "model", model_file="own.py")
    config = json.loads((model / "config.json").read_bytes())
    (model / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'trace')!r}).touch()\n"
        f"from mlx_lm.models.{config['model_type']} import Model, ModelArgs\n"
    )
    with pytest.raises(ConfigError, match="own.py"):
        load_base_model(example_config(model=str(model)))
    assert not (tmp_path / "trace").exists()
    load_base_model(example_config(model=str(model), trust_remote_code=True))
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"text_config": {"max_position_embeddings": 8}}, 8),
        ({"max_position_embeddings": True, "text_config": 3}, None),
        ({}, None),
    ],
)
def test_the_context_of_a_model_is_read_through_the_links_of_the_hubs_cache(
    tmp_path: Path, config: Any, length: int | None
) -> None:
    (tmp_path / "blob").write_text(json.dumps(config))
    (tmp_path / "config.json").symlink_to("blob")
    assert context_length(tmp_path) == length


def test_a_config_of_a_model_that_is_no_object_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(DamagedError, match=r"config\.json holds a list\. Expected a JSON object"):
        context_length(tmp_path)


@pytest.mark.parametrize(
    ("files", "kind", "advice"),
    [
        (("pytorch_model.bin",), "llama", "has no safetensors. .* `mlx_lm.convert --hf-path"),
        (("model-Q8_0.gguf",), "llama", "has no safetensors. It is a GGUF file, which mlx-lm does"),
        (
            ("model.safetensors",),
            "bert",
            "could not be loaded: .*no language model of the type bert. Give one that it has",
        ),
    ],
)
def test_a_model_of_another_form_is_refused_with_what_to_do(
    tmp_path: Path, files: tuple[str, ...], kind: str, advice: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=advice):
        load_base_model(example_config(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("key", "size"), [("vocab_size", 0), ("vocab_size", -5), ("num_attention_heads", 0)]
)
def test_a_model_with_a_size_that_cannot_be_is_refused(tmp_path, key: str, size: int) -> None:
    model = base_copy(tmp_path / "base")
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps(config | {key: size}))
    with pytest.raises(ConfigError, match=r"base could not be loaded: \w.* "):
        load_base_model(example_config(model=str(model)))


def test_a_gguf_as_the_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"a\.gguf is a GGUF file, which mlx-lm does not train"):
        find_model_folder(str(tmp_path / "a.gguf"))


def test_of_two_templates_the_one_that_is_used_is_written_over_the_other(tmp_path: Path) -> None:
    config, file = tmp_path / "tokenizer_config.json", tmp_path / "chat_template.jinja"
    for first, second in (("{{ a }}", "{{ b }}"), ("{{ b }}", "{{ b }}\n"), (None, "{{ b }}")):
        config.write_text(json.dumps({"eos_token": "x", "chat_template": first}))
        file.write_text(second)
        before, digest = config.read_text(), chat_template_digest(tmp_path)
        assert has_two_templates(tmp_path) is (first == "{{ a }}")
        write_used_template(tmp_path)
        assert chat_template_digest(tmp_path) == digest
        assert not has_two_templates(tmp_path)
        used = {"eos_token": "x", "chat_template": "{{ b }}"}
        if first == "{{ a }}":
            assert json.loads(config.read_text()) == used
        else:
            assert config.read_text() == before
    file.unlink()
    assert not has_two_templates(tmp_path)


def test_a_template_with_half_a_surrogate_pair_has_a_digest_of_its_own(tmp_path: Path) -> None:
    digests = set()
    for template in ("\ud800", "\udc00", "?"):
        write = json.dumps({"chat_template": template})
        (tmp_path / "tokenizer_config.json").write_text(write)
        digests.add(chat_template_digest(tmp_path))
    assert len(digests) == 3
