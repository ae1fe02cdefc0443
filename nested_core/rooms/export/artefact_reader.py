"""The program of the fresh process that reads an exported model alone, as any user's would.

A folder is read by mlx_lm.load, a GGUF by llama.cpp through llama-cpp-python. It imports nothing of
this project, and is asked for token ids, logits, losses and answers of what it has loaded.
"""

import ctypes
import hashlib
import json
import sys
from importlib.metadata import version
from typing import Any

import numpy as np

Logits = np.ndarray[Any, np.dtype[np.float32]]


class MlxLmReader:
    """A folder, by mlx_lm.load."""

    def __init__(self, request: dict[str, Any]) -> None:
        # transformers would import torch where it is installed, which takes seconds
        sys.modules["torch"] = None  # type: ignore[assignment]
        import mlx.core as mx
        from mlx_lm import load

        del sys.modules["torch"]
        trusts = {"trust_remote_code": request["trust_remote_code"]}
        self._mx = mx
        self._model, self.tokenizer = load(request["artefact"], trusts, **trusts)[:2]
        if request["dtype"] is not None:
            self._model.set_dtype(getattr(mx, request["dtype"]))
        self.name = f"mlx_lm {version('mlx-lm')}"
        self.chat_template = self.tokenizer.chat_template
        self.ends = sorted(self.tokenizer.eos_token_ids)

    def tokenizer_digest(self) -> str:
        """SHA-256 of tokenizer.json as it is in use."""
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        return list(map(int, self.tokenizer.encode(text)))

    def logits(self, tokens: list[int]) -> Logits:
        """Logits after each token, float32 (tokens, vocabulary)."""
        output = self._model(self._mx.array([tokens]))
        output = output[0] if isinstance(output, tuple) else output
        return np.array(output[0].astype(self._mx.float32))

    def answer(self, prompt: list[int], max_tokens: int, stop: list[str]) -> list[int]:
        """The likeliest tokens after a prompt, without the end of the text."""
        from mlx_lm.generate import generate_step

        tokens: list[int] = []
        steps = generate_step(self._mx.array(prompt), self._model, max_tokens=max_tokens)
        for token, _ in steps:
            if int(token) in self.ends:
                break
            tokens.append(int(token))
            if stop and any(text in self.tokenizer.decode(tokens) for text in stop):
                break
        return tokens


class LlamaCppReader:
    """A GGUF, by llama.cpp's C interface (llama.h) through llama-cpp-python."""

    def __init__(self, request: dict[str, Any]) -> None:
        import llama_cpp.llama_cpp as api

        self._api = api
        size = longest_row(request) + 1
        api.llama_backend_init()
        given = api.llama_model_default_params()
        given.n_gpu_layers = 0  # on the CPU its sums are the same on every machine of one kind
        given.use_extra_bufts = False  # the plain kernels: those for AMX ended in SIGSEGV with q8_0
        self._model = api.llama_model_load_from_file(request["artefact"].encode(), given)
        if not self._model:
            raise RuntimeError("llama.cpp does not load it")
        kept = api.llama_context_default_params()
        kept.n_ctx = kept.n_batch = kept.n_ubatch = size
        kept.type_k = kept.type_v = api.GGML_TYPE_F32
        self._context = api.llama_init_from_model(self._model, kept)
        self._batch = api.llama_batch_init(size, 0, 1)
        self._vocabulary = api.llama_model_get_vocab(self._model)
        self._count = api.llama_vocab_n_tokens(self._vocabulary)
        self.name = f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"
        self.chat_template = self._read_text("tokenizer.chat_template")
        self.ends = [token for token in range(self._count) if self._is_end(token)]

    def _is_end(self, token: int) -> bool:
        return bool(self._api.llama_vocab_is_eog(self._vocabulary, token))

    def _read_text(self, key: str) -> str | None:
        size = self._api.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        self._api.llama_model_meta_val_str(self._model, key.encode(), buffer, size + 1)
        return buffer.value.decode()

    def tokenizer_digest(self) -> str:
        """SHA-256 of the texts of all tokens as they are stored."""
        digest = hashlib.sha256()
        for token in range(self._count):
            digest.update(self._api.llama_vocab_get_text(self._vocabulary, token) + b"\n")
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with those that begin and end one as the file says."""
        given = text.encode()
        room = len(given) + 8
        ids = (self._api.llama_token * room)()
        count = self._api.llama_tokenize(self._vocabulary, given, len(given), ids, room, True, True)
        return list(ids[: max(count, 0)])

    def logits(self, tokens: list[int]) -> Logits:
        """Logits after each token, float32 (tokens, vocabulary)."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        return self._decode(tokens, 0)

    def _decode(self, tokens: list[int], start: int) -> Logits:
        """Logits after each token, the first of which has `start` tokens before it."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place] = token
            batch.pos[place] = start + place
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
            batch.logits[place] = 1
        if (code := self._api.llama_decode(self._context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        rows = [self._api.llama_get_logits_ith(self._context, row) for row in range(len(tokens))]
        return np.stack([np.ctypeslib.as_array(row, (self._count,)) for row in rows])

    def answer(self, prompt: list[int], max_tokens: int, stop: list[str]) -> list[int]:
        """The likeliest tokens after a prompt, without the end of the text."""
        tokens: list[int] = []
        row = self.logits(prompt)[-1]
        while len(tokens) < max_tokens and (token := int(row.argmax())) not in self.ends:
            tokens.append(token)
            if stop and any(text in self._decode_text(tokens) for text in stop):
                break
            row = self._decode([token], len(prompt) + len(tokens) - 1)[-1]
        return tokens

    def _decode_text(self, tokens: list[int]) -> str:
        ids = (self._api.llama_token * len(tokens))(*tokens)
        buffer = ctypes.create_string_buffer(64 * len(tokens) + 64)
        count = self._api.llama_detokenize(
            self._vocabulary, ids, len(tokens), buffer, len(buffer), False, True
        )
        return buffer.raw[: max(count, 0)].decode(errors="replace")


def longest_row(request: dict[str, Any]) -> int:
    """The most tokens that a model is given at once, the answers to the suites included."""
    rows = [len(prompt) for prompt in request["prompts"]]
    rows += [len(example["tokens"]) for example in request["examples"]]
    for suite in request["suites"]:
        for prompt, choices in zip(suite["prompts"], suite["choices"], strict=True):
            rows.append(len(prompt) + max([suite["max_tokens"], *map(len, choices)]))
    return max(rows, default=1)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What is read of the artefact; an error is one of the artefact, of memory or of the reader."""
    reader: Any = {"mlx_lm": MlxLmReader, "llama.cpp": LlamaCppReader}[request["reader"]](request)
    return {
        "reader": reader.name,
        "tokenizer": reader.tokenizer_digest(),
        "chat_template": reader.chat_template,
        "ends": reader.ends,
        "token_ids": [reader.encode(text) for text in request["texts"]],
        "logits": [
            reader.logits(prompt)[-1][request["columns"]].tolist() for prompt in request["prompts"]
        ],
        "losses": [sum_losses(reader, example) for example in request["examples"]],
        "suites": [ask(reader, suite) for suite in request["suites"]],
    }


def sum_losses(reader: Any, example: dict[str, Any]) -> float:
    """The summed loss in nats of the tokens of an example that `targets` names by their places."""
    tokens, places = example["tokens"], np.array(example["targets"], np.int64)
    return -float(log_probabilities(reader.logits(tokens[:-1]), tokens, places).sum())


def log_probabilities(logits: Logits, tokens: list[int], places: Any) -> Any:
    """Of each token at one of these places, its log-probability after those before it."""
    rows = logits[places - 1].astype(np.float64)
    largest = rows.max(axis=-1)
    sums = largest + np.log(np.exp(rows - largest[:, None]).sum(axis=-1))
    return rows[np.arange(len(places)), np.array(tokens)[places]] - sums


def ask(reader: Any, suite: dict[str, Any]) -> dict[str, Any]:
    """The tokens of each answer; where there are choices, the log-likelihood of each instead."""
    if not any(suite["choices"]):
        return {
            "answers": [
                reader.answer(prompt, suite["max_tokens"], suite["stop"])
                for prompt in suite["prompts"]
            ]
        }
    likelihoods = []
    for prompt, choices in zip(suite["prompts"], suite["choices"], strict=True):
        sums = []
        for choice in choices:
            tokens = [*prompt, *choice]
            places = np.arange(len(prompt), len(tokens))
            logits = reader.logits(tokens[:-1])
            sums.append(float(log_probabilities(logits, tokens, places).sum()))
        likelihoods.append(sums)
    return {"likelihoods": likelihoods}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))  # noqa: T201
