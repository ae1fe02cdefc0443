"""Which base model a folder holds: what is told apart, and what is not looked at."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from mlx_lm.utils import _download

from nested_core.models.base_model import PAGE_BYTES, PAGE_STRIDE, base_fingerprint, find_model

FILES = {
    "config.json": b"{" + b" " * (3 * PAGE_BYTES) + b"}",
    "own_model.py": b"# code\n" * PAGE_BYTES,
    "model.safetensors": bytes(2 * PAGE_STRIDE),
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
        ("config.json", 2 * PAGE_BYTES + 1),
        ("own_model.py", 0),
        ("own_model.py", PAGE_BYTES + 1),
        ("own_model.py", -1),
        ("model.safetensors", 0),
        ("model.safetensors", PAGE_STRIDE),
    ],
)
def test_another_byte_is_another_base(folder: Path, name: str, at: int) -> None:
    before = base_fingerprint(folder)
    change(folder / name, at)
    assert base_fingerprint(folder) != before
    change(folder / name, at)
    assert base_fingerprint(folder) == before


def test_code_or_weights_that_come_or_go_are_another_base(folder: Path) -> None:
    before = base_fingerprint(folder)
    (folder / "more.py").write_bytes(b"")
    with_more = base_fingerprint(folder)
    assert with_more != before
    (folder / "more.py").rename(folder / "model-2.safetensors")
    assert base_fingerprint(folder) not in (before, with_more)


def test_what_a_model_is_not_made_of_is_not_looked_at(folder: Path) -> None:
    before = base_fingerprint(folder)
    (folder / "README.md").write_text("words")
    assert base_fingerprint(folder) == before


def test_mlx_lm_still_resolves_a_local_folder_through_the_private_function_used_here(
    tmp_path: Path,
) -> None:
    parameters = list(inspect.signature(_download).parameters.values())
    assert parameters[0].name == "path_or_hf_repo"
    assert all(each.default is not inspect.Parameter.empty for each in parameters[1:])
    assert find_model(str(tmp_path)) == Path(_download(str(tmp_path))) == tmp_path
