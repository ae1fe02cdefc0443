"""Versions of the example's model in a registry, made without training, and a server of them."""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_tokenizer

from flows.cli import build_parser
from nested_core.gate.proof.canary import CanaryPrompt, make_canary
from nested_core.gate.proof.fresh_process_check import (
    FreshProcessLogits,
    ProofRequest,
    compute_logits_in_fresh_process,
)
from nested_core.models.base_model import fingerprint_base_model
from nested_core.models.generation import encode_prompt
from nested_core.rooms.serve.http_handler import ServingServer
from nested_core.rooms.serve.server import starting_server
from nested_core.storage.adapter import read_adapter, write_adapter
from nested_core.storage.canary_file import CANARY_NAME, render_canary
from tests.builders.registering import register_and_promote
from tests.core.registry.conftest import write_gate

NAME = "capitals"
CHAT = "/v1/chat/completions"
NO_END: dict[str, Any] = {"max_tokens": 2**20, "logit_bias": {"0": -1000}}  # no end of text
QUESTION = "I want to see Italy. Where to?"
COUNTRIES = ("Italy", "Fiji", "Peru", "Japan")


def make_base(source: Path, folder: Path, context: int = 4096) -> Path:
    """The example's model in float32, in which answers do not depend on how they are batched.

    It says that it sees `context` tokens, so that there are long answers.
    """
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    weights: Any = mx.load(str(source / "model.safetensors"))
    mx.save_safetensors(
        str(folder / "model.safetensors"), {k: v.astype(mx.float32) for k, v in weights.items()}
    )
    return folder


def quantise_base(source: Path, folder: Path) -> Path:
    """A base in 4 bits, with groups of 32 weights, as mlx_lm.convert writes one."""
    model: Any = load(str(source))[0]
    nn.quantize(model, group_size=32, bits=4)
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization": {"group_size": 32, "bits": 4}})
    )
    leaves: Any = tree_flatten(model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(leaves))
    return folder


@dataclass(frozen=True)
class AdapterShape:
    """What an adapter's layers are; two of different shapes need other layers.

    layers: how many, from the last one on. noise: the standard deviation of its tensors.
    """

    rank: int = 4
    keys: tuple[str, ...] = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    fine_tune_type: str = "lora"
    layers: int = 6
    noise: float = 0.2


def write_version_run(
    run_dir: Path, base: Path, seed: int, shape: AdapterShape = AdapterShape()
) -> Path:
    """A run directory with an adapter of random tensors that changes every answer.

    A full fine-tune is the base's last layer with noise.
    """
    model: Any = load(str(base))[0]
    lora = {"rank": shape.rank, "scale": 4.0, "dropout": 0.0, "keys": list(shape.keys)}
    is_full = shape.fine_tune_type == "full"
    model.freeze()
    if is_full:
        model.layers[-1].unfreeze()
    else:
        linear_to_lora_layers(model, shape.layers, lora, use_dora=shape.fine_tune_type == "dora")
    key = mx.random.key(seed)
    tensors = {}
    leaves: Any = tree_flatten(model.trainable_parameters())
    for name, value in leaves:
        key, drawn = mx.random.split(key)
        is_magnitude = name.rsplit(".", 1)[-1] == "m"
        noise = mx.random.normal(value.shape, key=drawn) * shape.noise
        tensors[name] = value + noise if is_full else value if is_magnitude else noise
    config = {
        "model": str(base),
        "fine_tune_type": shape.fine_tune_type,
        "num_layers": 1 if is_full else shape.layers,
        "lora_parameters": None if is_full else lora,
        "base_fingerprint": fingerprint_base_model(base),
    }
    (run_dir / "adapter").mkdir(parents=True)
    write_adapter(run_dir / "adapter", tensors, config)
    write_gate(run_dir, "passed", read_adapter(run_dir / "adapter").digest())
    return run_dir


def record_canary(run_dir: Path, base: Path, countries: Sequence[str] = COUNTRIES) -> None:
    """Write the canary of a run's adapter, as the gate does: a question about each country."""
    tokenizer: Any = load_tokenizer(base)
    texts = [f"I want to see {country}. Where to?" for country in countries]
    prompts = [
        CanaryPrompt("capitals", line, tuple(encode_prompt(tokenizer, text)))
        for line, text in enumerate(texts, 1)
    ]
    request = ProofRequest(
        model=base,
        initial=None,
        trained=run_dir / "adapter",
        columns=range(0, tokenizer.vocab_size, 5),
        questions=[prompt.tokens for prompt in prompts],
    )
    answers = compute_logits_in_fresh_process(request)
    assert isinstance(answers, FreshProcessLogits)
    assert answers.canary is not None
    canary = make_canary(prompts, request, answers.canary)
    (run_dir / CANARY_NAME).write_bytes(render_canary(canary))
    write_gate(run_dir, "passed", read_adapter(run_dir / "adapter").digest())


def promote_run(run_dir: Path, registry: Path, name: str = NAME) -> str:
    """Promote a run's adapter; the version."""
    return register_and_promote(run_dir, registry, name, {}, by="a test").version


def settings(
    registry: Path, *flags: object, api_key: str | None = None
) -> tuple[argparse.Namespace, str | None]:
    """What `nested-tune serve` with these flags would serve, at a port that the system chooses."""
    words = ["serve", "--registry", registry, "--port", 0, "--max-tokens", 12, *flags]
    arguments: argparse.Namespace = build_parser().parse_args([str(word) for word in words])
    return arguments, api_key


@dataclass(frozen=True)
class Reply:
    """An answer of the server, with its status and headers."""

    status: int
    headers: dict[str, str]
    body: str

    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    @property
    def version(self) -> str | None:
        """The version that the header names."""
        return self.headers.get("x-adapter-version")

    @property
    def text(self) -> str:
        """The answer of a chat."""
        return str(self.json()["choices"][0]["message"]["content"] or "")


@dataclass(frozen=True)
class Client:
    """Sends requests to a server, a connection each."""

    server: ServingServer

    @property
    def address(self) -> tuple[str, int]:
        """The host and the port."""
        host, port = self.server.address.removeprefix("http://").split(":")
        return host, int(port)

    def connect(self) -> socket.socket:
        """A connection over which nothing has been sent."""
        return socket.create_connection(self.address, timeout=60)

    def send(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: dict[str, str] | None = None,
        source: str = "127.0.0.1",
    ) -> Reply:
        """One request of the client at `source`, and the whole answer."""
        connection = http.client.HTTPConnection(
            *self.address, timeout=300, source_address=(source, 0)
        )
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, headers or {})
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, named, response.read().decode())
        finally:
            connection.close()

    def chat(
        self,
        model: str | None = None,
        prompt: str = QUESTION,
        source: str = "127.0.0.1",
        **more: Any,
    ) -> Reply:
        """Ask a question as a user."""
        body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], **more}
        named = body if model is None else body | {"model": model}
        return self.send("POST", CHAT, named, source=source)

    def health(self) -> Any:
        """What /health says."""
        return self.send("GET", "/health").json()


@contextmanager
def serving(wanted: tuple[argparse.Namespace, str | None]) -> Iterator[Client]:
    """A server in this process, until the block ends."""
    with starting_server(*wanted) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield Client(server)
        finally:
            server.shutdown()
            thread.join()
