"""Requests by the thousand to a server whose champion changes under them, each answer compared.

    python -m tests.rooms.serve.serving_load --requests 10000 --swaps 50
    python -m tests.rooms.serve.serving_load --requests 2000 --swaps 20 --size 0.5B

First each version is asked each question twice, one request at a time, the second time with a
cached prompt. Then clients ask without a pause, and after so many answers the next version is
promoted. The versions are of two ranks and of other keys, so that layers are attached anew, and
each has a canary of 20 questions. Each answer is compared with mlx_lm.generate's for the version
that it names, in float32. A batch may round otherwise than one request alone: where the first token
that differs was a near tie there, it counts as such. At 0.5B the weights are random, and the
tokenizer is the example's. A GPU rounds the factors of products to TF32 unless MLX_ENABLE_TF32=0.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nested_core import backend

backend.prepare()  # before anything imports mlx

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm import generate, load  # noqa: E402
from mlx_lm.models import llama  # noqa: E402

from nested_core.models.generation import encode_prompt  # noqa: E402
from tests.example import MODEL  # noqa: E402
from tests.rooms.serve.versions import (  # noqa: E402
    NAME,
    AdapterShape,
    Client,
    make_base,
    promote_run,
    record_canary,
    serving,
    settings,
    write_version_run,
)

SHAPES = (
    AdapterShape(),
    AdapterShape(),
    AdapterShape(rank=8, keys=("self_attn.k_proj", "mlp.up_proj")),
    AdapterShape(rank=8),
)
COUNTRIES = (
    *("Italy", "Fiji", "Peru", "Norway", "Chad", "Japan", "Cuba", "Kenya", "Spain", "France"),
    *("Ghana", "Nepal", "Qatar", "Sudan", "Tonga", "Yemen", "Togo", "Oman", "Mali", "Laos"),
)
ASKED_BY_CLIENTS = 8
PROMPTS = tuple(f"I want to see {country}. Where to?" for country in COUNTRIES[:ASKED_BY_CLIENTS])
MAX_TOKENS = 12
NEAR_TIE = 1e-3  # between the two likeliest tokens' logits


@dataclass(frozen=True)
class Size:
    """A base by what differs from the example's config.json, and its adapters.

    layers: how many have an adapter. noise: the standard deviation of its tensors.
    """

    changes: dict[str, int]
    layers: int
    noise: float


SIZES = {
    "example": Size({}, layers=6, noise=0.2),
    "0.5B": Size(  # 0.49 billion weights beside the example's small vocabulary
        {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 38,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
        layers=38,
        noise=0.05,
    ),
}


@dataclass
class Load:
    """What was seen.

    alone: answers to one request at a time: "equal" to mlx_lm.generate's, or "other".
    differing: version, prompt and tokens of each answer under load that was another.
    seconds_to_follow: from before a promotion to the first answer of the version, under load; and
        seconds_to_follow_at_rest where nothing else is asked.
    bytes_at_rest: in arrays while nobody asks, of one version after one answer: before all, and
        after all.
    """

    weights: int = 0
    alone: Counter[str] = field(default_factory=Counter)
    different_texts: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    differing: list[tuple[str, str, list[int]]] = field(default_factory=list)
    near_ties: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds_to_follow: list[float] = field(default_factory=list)
    seconds_to_follow_at_rest: list[float] = field(default_factory=list)
    bytes_after_swaps: list[int] = field(default_factory=list)
    bytes_at_rest: list[int] = field(default_factory=list)
    base_is_the_same: bool = True
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        half = len(self.bytes_after_swaps) // 2
        return {
            "device": backend.device_name(),
            "weights": self.weights,
            "alone": dict(self.alone),
            "different_texts_expected": self.different_texts,
            "requests": self.answers.total(),
            "versions": len(self.answers),
            "swaps": len(self.seconds_to_follow),
            "near_ties": self.near_ties,
            "wrong_or_lost": len(self.wrong),
            "seconds": round(self.seconds, 1),
            "seconds_to_follow": describe_seconds(self.seconds_to_follow),
            "seconds_to_follow_at_rest": describe_seconds(self.seconds_to_follow_at_rest),
            "base_is_the_same": self.base_is_the_same,
            "bytes_at_rest": self.bytes_at_rest,
            "megabytes_in_arrays_first_half_max": round(
                max(self.bytes_after_swaps[:half], default=0) / 1e6, 2
            ),
            "megabytes_in_arrays_second_half_max": round(
                max(self.bytes_after_swaps[half:], default=0) / 1e6, 2
            ),
        }


def describe_seconds(seconds: list[float]) -> dict[str, float]:
    """How many, their median and the most; of none, their number alone."""
    if not seconds:
        return {"count": 0}
    return {
        "count": len(seconds),
        "median": round(statistics.median(seconds), 2),
        "most": round(max(seconds), 2),
    }


class Reference:
    """What mlx_lm.generate answers for each version, one prompt at a time."""

    def __init__(self, base: Path, runs: dict[str, Path]) -> None:
        self._models = {
            version: load(str(base), adapter_path=str(run / "adapter"))[:2]
            for version, run in runs.items()
        }
        self.texts = {
            (version, prompt): self._answer(version, prompt)
            for version in runs
            for prompt in PROMPTS
        }

    def _answer(self, version: str, prompt: str) -> str:
        model, tokenizer = self._models[version]
        tokens = encode_prompt(tokenizer, prompt)
        return generate(model, tokenizer, tokens, max_tokens=MAX_TOKENS).strip()

    def is_near_tie(self, version: str, prompt: str, tokens: Sequence[int]) -> bool:
        """Whether the first token that is not the likeliest was nearly that."""
        model, tokenizer = self._models[version]
        asked = encode_prompt(tokenizer, prompt)
        logits = model(mx.array([[*asked, *tokens]]))[0]
        for position, token in enumerate(tokens, start=len(asked) - 1):
            row = logits[position]
            if mx.argmax(row).item() != token:
                return bool((mx.max(row) - row[token]).item() <= NEAR_TIE)
        return False


@dataclass
class ServerUnderLoad:
    """Versions in a registry, and a server of them that is asked.

    paths: the runs whose adapters are the versions. end: when nothing more is asked, as
    time.monotonic.
    """

    client: Client
    registry: Path
    paths: Sequence[Path]
    reference: Reference
    seen: Load
    end: float
    lock: threading.Lock = field(default_factory=threading.Lock)

    def promote_and_follow(self, number: int) -> float:
        """Promote one of the runs, wait until its version answers, and return the seconds."""
        began = time.monotonic()
        version = promote_run(self.paths[number % len(self.paths)], self.registry)
        while self.client.chat(NAME, max_tokens=1).version != version:
            time.sleep(0.01)
        return time.monotonic() - began

    def ask_alone(self) -> None:
        """Ask each question twice, one at a time: the second time its prompt is cached."""
        for prompt in (*PROMPTS, *PROMPTS):
            reply = self.client.chat(NAME, prompt)
            is_equal = reply.text.strip() == self.reference.texts[str(reply.version), prompt]
            self.seen.alone["equal" if is_equal else "other"] += 1

    def note_bytes_at_rest(self) -> None:
        """Change to another version and back, drop all caches, and ask once."""
        self.seen.seconds_to_follow_at_rest += map(self.promote_and_follow, (1, 0))
        self.client.server.generator.prompt_cache.trim_to(n_sequences=0)
        self.client.chat(NAME, PROMPTS[0])
        gc.collect()
        self.seen.bytes_at_rest.append(mx.get_active_memory())

    def ask_without_pause(self, first: int, count: int) -> None:
        """Ask so many questions, each as soon as the one before is answered."""
        for number in range(first, first + count):
            if time.monotonic() > self.end:
                return
            prompt = PROMPTS[number % len(PROMPTS)]
            compare(self.client, prompt, self.reference, self.seen, self.lock)

    def change_under_load(self, requests: int, swaps: int, clients: int) -> None:
        """Ask by so many clients at once, and change the version so often meanwhile."""
        share = requests // clients
        threads = [
            threading.Thread(target=self.ask_without_pause, args=(index, share))
            for index in range(clients)
        ]
        for thread in threads:
            thread.start()
        for swap in range(swaps):
            due = (swap + 1) * requests // (swaps + 2)
            while self.seen.answers.total() < due and time.monotonic() < self.end:
                time.sleep(0.01)
            if time.monotonic() < self.end:
                self.seen.seconds_to_follow.append(self.promote_and_follow(swap + 1))
                self.seen.bytes_after_swaps.append(mx.get_active_memory())
        for thread in threads:
            thread.join()


def hammer(
    folder: Path,
    *,
    requests: int,
    swaps: int,
    clients: int,
    size: str = "example",
    seconds: float = math.inf,
) -> Load:
    """Ask so many times, while the champion changes so often; ask nothing after the seconds."""
    end = time.monotonic() + seconds
    base = make_sized_base(size, folder / "base")
    paths = make_versions(size, folder, base)
    registry = folder / "registry"
    reference = Reference(base, {promote_run(path, registry): path for path in paths})
    promote_run(paths[0], registry)
    seen = Load(different_texts=len(set(reference.texts.values())))
    flags = ("--name", NAME, "--log-level", "ERROR", "--max-tokens", MAX_TOKENS)
    begin = time.monotonic()
    with serving(settings(registry, *flags)) as client:
        provider = client.server.generator.model_provider
        arrays = leaves_of(provider.base)
        seen.weights = sum(array.size for array in arrays.values())
        under_load = ServerUnderLoad(client, registry, paths, reference, seen, end)
        for number in range(1, len(paths) + 1):
            seen.seconds_to_follow_at_rest.append(under_load.promote_and_follow(number))
            under_load.ask_alone()
        under_load.note_bytes_at_rest()
        under_load.change_under_load(requests, swaps, clients)
        under_load.note_bytes_at_rest()
        after = leaves_of(provider.base)
        seen.base_is_the_same = all(after[name] is array for name, array in arrays.items())
    seen.seconds = time.monotonic() - begin
    judge_differing_answers(reference, seen)
    return seen


def make_sized_base(size: str, folder: Path) -> Path:
    """The example's model in float32, or one of random weights that has its tokenizer."""
    changes = SIZES[size].changes
    if not changes:
        return make_base(MODEL, folder)
    folder.mkdir(parents=True)
    for path in MODEL.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((MODEL / "config.json").read_text()) | changes | {"torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.save_safetensors(str(folder / "model.safetensors"), leaves_of(model))
    return folder


def make_versions(size: str, folder: Path, base: Path) -> list[Path]:
    """A run of each shape, with its canary."""
    layers, noise = SIZES[size].layers, SIZES[size].noise
    shapes = [replace(shape, layers=layers, noise=noise) for shape in SHAPES]
    paths = [
        write_version_run(folder / f"run-{seed}", base, seed, shape)
        for seed, shape in enumerate(shapes, start=1)
    ]
    with ThreadPoolExecutor() as pool:  # each waits for a process
        list(pool.map(lambda path: record_canary(path, base, COUNTRIES), paths))
    return paths


def leaves_of(model: Any) -> dict[str, mx.array]:
    """The arrays of a model by name."""
    leaves: Any = tree_flatten(model.parameters())
    return dict(leaves)


def compare(
    client: Client, prompt: str, reference: Reference, seen: Load, lock: threading.Lock
) -> None:
    """Ask once, and compare the answer with that of the version that it names."""
    reply = client.chat(NAME, prompt, logprobs=True)
    version = str(reply.version)
    with lock:
        seen.answers[version] += 1
        if reply.status != 200 or version not in {known for known, _ in reference.texts}:
            seen.wrong.append(f"{prompt}: {reply}")
        elif reply.text.strip() != reference.texts[version, prompt]:
            content = reply.json()["choices"][0]["logprobs"]["content"]
            seen.differing.append((version, prompt, [token["id"] for token in content]))


def judge_differing_answers(reference: Reference, seen: Load) -> None:
    """Tell near ties from answers that are wrong."""
    for version, prompt, tokens in seen.differing:
        if reference.is_near_tie(version, prompt, tokens):
            seen.near_ties += 1
        else:
            seen.wrong.append(f"{prompt}: tokens {tokens} by {version}")


def main() -> int:
    """Print the figures; 1 where an answer was wrong or lost."""
    parser = argparse.ArgumentParser(description="Load on a server whose champion changes.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--size", choices=SIZES, default="example")
    parser.add_argument("--seconds", type=float, default=math.inf, help="ask nothing after so long")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = hammer(
            Path(folder),
            requests=arguments.requests,
            swaps=arguments.swaps,
            clients=arguments.clients,
            size=arguments.size,
            seconds=arguments.seconds,
        )
    print(json.dumps(seen.summary(), indent=2))
    for line in seen.wrong[:10]:
        print(line)
    return 1 if seen.wrong or seen.alone["other"] or not seen.base_is_the_same else 0


if __name__ == "__main__":
    raise SystemExit(main())
