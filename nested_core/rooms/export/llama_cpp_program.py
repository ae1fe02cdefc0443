"""The program of the fresh process in which llama.cpp works, through llama-cpp-python.

It reads a GGUF, or stores its matrices in fewer bits by llama.cpp's own code. It imports nothing
of this project, and answers as the one that reads a folder by mlx_lm does
(nested_core/measure/fresh_process/).
"""

import ctypes
import hashlib
import os
import runpy
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np

Logits = np.ndarray[Any, np.dtype[np.float32]]


class LlamaCppReader:
    """A GGUF, by llama.cpp's C interface (llama.h) through llama-cpp-python."""

    def __init__(self, file: str, adapter: str | None, request: dict[str, Any]) -> None:
        import llama_cpp.llama_cpp as api

        self._api = api
        size = longest_row(request) + 1
        api.llama_backend_init()
        given = api.llama_model_default_params()
        given.n_gpu_layers = 0  # on the CPU its sums are the same on every machine of one kind
        given.use_extra_bufts = False  # the plain kernels: those for AMX ended in SIGSEGV with q8_0
        self._model = api.llama_model_load_from_file(file.encode(), given)
        if not self._model:
            raise RuntimeError("llama.cpp does not load it")
        kept = api.llama_context_default_params()
        kept.n_ctx = kept.n_batch = kept.n_ubatch = size
        kept.type_k = kept.type_v = api.GGML_TYPE_F32
        self._context = api.llama_init_from_model(self._model, kept)
        if adapter is not None:
            self._apply(adapter)
        self._batch = api.llama_batch_init(size, 0, 1)
        self._vocabulary = api.llama_model_get_vocab(self._model)
        self._count = api.llama_vocab_n_tokens(self._vocabulary)
        self.name = f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"
        template = api.llama_model_chat_template(self._model, None)
        self.chat_template = None if template is None else template.decode()
        ids = range(self._count)
        self.ends = [token for token in ids if api.llama_vocab_is_eog(self._vocabulary, token)]

    def _apply(self, adapter: str) -> None:
        """Apply a LoRA at its own scale."""
        loaded = self._api.llama_adapter_lora_init(self._model, adapter.encode())
        if not loaded:
            raise RuntimeError("llama.cpp does not load it on this base")
        adapters = (self._api.llama_adapter_lora_p_ctypes * 1)(loaded)
        scales = (ctypes.c_float * 1)(1.0)
        if self._api.llama_set_adapters_lora(self._context, adapters, 1, scales) != 0:
            raise RuntimeError("llama.cpp does not apply it")

    def tokenizer_digest(self) -> str:
        """Return the SHA-256 of the texts of all tokens as they are stored."""
        digest = hashlib.sha256()
        for token in range(self._count):
            digest.update(self._api.llama_vocab_get_text(self._vocabulary, token) + b"\n")
        return digest.hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with those that begin and end one as the file says."""
        given = text.encode()
        room = len(given) + 8
        ids = (self._api.llama_token * room)()
        count = self._api.llama_tokenize(self._vocabulary, given, len(given), ids, room, True, True)
        return list(ids[: max(count, 0)])

    def factors(self) -> list[str]:
        """Return the names of the model's LoRA factors: a GGUF has none."""
        return []

    def logits(self, tokens: list[int], places: list[int]) -> Iterator[Logits]:
        """Yield logits after the tokens at these places, float32 (places, vocabulary)."""
        yield self._decode_anew(tokens)[np.array(places, np.int64)]

    def _decode_anew(self, tokens: list[int]) -> Logits:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        return self._decode(tokens, 0)

    def _decode(self, tokens: list[int], start: int) -> Logits:
        """Return the logits after each of these tokens, float32 (tokens, vocabulary).

        start: the number of tokens before them, which were decoded earlier.
        """
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
        rows = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(rows, (len(tokens), self._count)).copy()

    def answer(self, prompt: list[int], max_tokens: int, stop: list[str]) -> dict[str, Any]:
        """Generate the likeliest tokens after a prompt; return them and their text.

        Ends after `max_tokens`, a text of `stop`, or a token that ends the text, which is included.
        """
        tokens: list[int] = []
        row = self._decode_anew(prompt)[-1]
        while len(tokens) < max_tokens:
            tokens.append(int(row.argmax()))
            if tokens[-1] in self.ends or any(text in self._decode_text(tokens) for text in stop):
                break
            row = self._decode(tokens[-1:], len(prompt) + len(tokens) - 1)[-1]
        return {"tokens": tokens, "text": self._decode_text(tokens)}

    def _decode_text(self, tokens: list[int]) -> str:
        ids = (self._api.llama_token * len(tokens))(*tokens)
        buffer = ctypes.create_string_buffer(64 * len(tokens) + 64)
        count = self._api.llama_detokenize(
            self._vocabulary, ids, len(tokens), buffer, len(buffer), False, True
        )
        return buffer.raw[: max(count, 0)].decode(errors="replace")


def longest_row(request: dict[str, Any]) -> int:
    """Return the most tokens that a model is given at once, with answers to the questions."""
    rows = [len(prompt) for prompt in request["prompts"]]
    rows += [len(row["tokens"]) for row in request["rows"]]
    rows += [len(asked["prompt"]) + asked["max_tokens"] for asked in request["questions"]]
    return max(rows, default=1)


def quantize(file: str, to: str, kind: int) -> dict[str, Any]:
    """Write the GGUF `to`, with the matrices of another one in a format of few bits."""
    import llama_cpp.llama_cpp as api

    given = api.llama_model_quantize_default_params()
    given.ftype, given.nthread = kind, os.cpu_count() or 1
    if (code := api.llama_model_quantize(file.encode(), to.encode(), ctypes.byref(given))) != 0:
        raise RuntimeError(f"llama_model_quantize returned {code}")
    return {}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compute what the request asks, for each model by its name; any error is raised.

    A request to `quantize` names two files, and a number of the enum llama_ftype of llama.h.
    """
    if "quantize" in request:
        return quantize(*request["quantize"])
    answer_questions = runpy.run_path(request["program"])["answer_questions"]
    return {
        model["name"]: answer_questions(
            LlamaCppReader(model["base"], model["adapter"], request), request
        )
        for model in request["models"]
    }
