"""Requests by the thousand to a server whose champion changes under them, each answer compared.

    python -m tests.reliability.serving_load --requests 10000 --swaps 50

Clients ask without a pause. After so many answers the next version is promoted; the versions are of
two ranks and of other keys, so that layers are attached anew, and each has a canary of 20
questions. Each answer is compared with that of
plain mlx_lm for the version that it names, in float32. A batch may round otherwise than one request
alone: where the first token that differs was a near tie there, it counts as such.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nested_core import backend

backend.prepare()  # before anything imports mlx

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm import load  # noqa: E402

from nested_core.models.generation import (  # noqa: E402
    Sampling,
    answer_prompts,
    encode_prompt,
)
from tests.core.serve.versions import (  # noqa: E402
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
from tests.example import MODEL  # noqa: E402

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


@dataclass
class Load:
    """What was seen.

    seconds_to_follow: from before a promotion to the first answer of the version.
    bytes_at_rest: in arrays while nobody asks, of one version after one answer: before all, and
        after all.
    """

    answers: Counter[str] = field(default_factory=Counter)
    near_ties: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds_to_follow: list[float] = field(default_factory=list)
    bytes_after_swaps: list[int] = field(default_factory=list)
    bytes_at_rest: list[int] = field(default_factory=list)
    base_is_the_same: bool = True
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        half = len(self.bytes_after_swaps) // 2
        return {
            "requests": self.answers.total(),
            "versions": len(self.answers),
            "swaps": len(self.seconds_to_follow),
            "near_ties": self.near_ties,
            "wrong_or_lost": len(self.wrong),
            "seconds": round(self.seconds, 1),
            "seconds_to_follow_median": round(statistics.median(self.seconds_to_follow), 2),
            "seconds_to_follow_max": round(max(self.seconds_to_follow), 2),
            "base_is_the_same": self.base_is_the_same,
            "bytes_at_rest": self.bytes_at_rest,
            "megabytes_in_arrays_first_half_max": round(
                max(self.bytes_after_swaps[:half]) / 1e6, 2
            ),
            "megabytes_in_arrays_second_half_max": round(
                max(self.bytes_after_swaps[half:]) / 1e6, 2
            ),
        }


class Reference:
    """What plain mlx_lm answers for each version, one prompt at a time."""

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
        return answer_prompts(model, tokenizer, [tokens], Sampling(MAX_TOKENS))[0].text.strip()

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


def hammer(folder: Path, *, requests: int, swaps: int, clients: int) -> Load:
    """Ask so many times, while the champion changes so often."""
    base = make_base(MODEL, folder / "base")
    paths = [
        write_version_run(folder / f"run-{seed}", base, seed, shape)
        for seed, shape in enumerate(SHAPES, start=1)
    ]
    for path in paths:
        record_canary(path, base, COUNTRIES)
    registry = folder / "registry"
    runs = {promote_run(path, registry): path for path in paths}
    reference = Reference(base, runs)
    promote_run(paths[0], registry)
    seen = Load()
    lock = threading.Lock()
    flags = ("--name", NAME, "--log-level", "ERROR", "--max-tokens", MAX_TOKENS)
    begin = time.monotonic()
    with serving(settings(registry, *flags)) as client:
        provider = client.server.generator.model_provider
        arrays = leaves_of(provider.base)

        def note_bytes_at_rest() -> None:
            """Change to another version and back, which drops all caches, and ask once."""
            for path in (paths[1], paths[0]):
                follow(client, promote_run(path, registry))
            client.chat(NAME, PROMPTS[0])
            gc.collect()
            seen.bytes_at_rest.append(mx.get_active_memory())

        note_bytes_at_rest()

        def ask(first: int, count: int) -> None:
            for number in range(first, first + count):
                prompt = PROMPTS[number % len(PROMPTS)]
                compare(client, prompt, reference, seen, lock)

        share = requests // clients
        threads = [threading.Thread(target=ask, args=(index, share)) for index in range(clients)]
        for thread in threads:
            thread.start()
        for swap in range(swaps):
            while seen.answers.total() < (swap + 1) * requests // (swaps + 2):
                time.sleep(0.01)
            began = time.monotonic()
            follow(client, promote_run(paths[(swap + 1) % len(paths)], registry))
            seen.seconds_to_follow.append(time.monotonic() - began)
            seen.bytes_after_swaps.append(mx.get_active_memory())
        for thread in threads:
            thread.join()
        note_bytes_at_rest()
        after = leaves_of(provider.base)
        seen.base_is_the_same = all(after[name] is array for name, array in arrays.items())
    seen.seconds = time.monotonic() - begin
    return seen


def follow(client: Client, version: str) -> None:
    """Ask until a version answers."""
    while client.chat(NAME, max_tokens=1).version != version:
        time.sleep(0.01)


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
            if reference.is_near_tie(version, prompt, [token["id"] for token in content]):
                seen.near_ties += 1
            else:
                seen.wrong.append(f"{prompt}: {reply.text!r} by {version}")


def main() -> int:
    """Print the figures; 1 where an answer was wrong or lost."""
    parser = argparse.ArgumentParser(description="Load on a server whose champion changes.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--swaps", type=int, default=50)
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = hammer(
            Path(folder),
            requests=arguments.requests,
            swaps=arguments.swaps,
            clients=arguments.clients,
        )
    print(json.dumps(seen.summary(), indent=2))
    for line in seen.wrong[:10]:
        print(line)
    return 1 if seen.wrong or not seen.base_is_the_same else 0


if __name__ == "__main__":
    raise SystemExit(main())
