"""A tokenizer as GGUF stores it: made of a Hugging Face one, and turned back into one.

llama.cpp knows how a text is split by a name (`tokenizer.ggml.pre`) and has the rules in its code,
so a tokenizer with other rules cannot be written. Byte-level BPE goes with its merges; BPE in the
manner of SentencePiece goes with a score a token, which is the rank of the merge that makes it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from nested_core.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
BYTE_TEXT = r"<0x..>"
SPACE = "▁"  # of SentencePiece
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_PATTERNS = {
    "llama-bpe": rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|\p{{N}}{_REST}",
}
LARGEST_PENALTY = -1e6  # the score of a token that no merge makes


# How a byte-level tokenizer splits a text, by llama.cpp's name of the rules
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
_BYTES_ALONE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PRE_TOKENIZERS = {
    "gpt-2": _BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTES]),
} | {
    name: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), _BYTES_ALONE])
    for name, pattern in SPLIT_PATTERNS.items()
}
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def describe_vocabulary(tokenizer: Any, size: int) -> dict[str, Any]:
    """Return GGUF's metadata for a tokenizer of mlx_lm.

    size: the number of rows of the model's embeddings; ids without a token get unused ones.

    Raises ConfigError for a tokenizer whose rules llama.cpp does not have.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unsupported("it is none of the `tokenizers` library")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"its model is {model['type']}, not BPE")
    pre = None if model.get("byte_fallback") else find_pre_tokenizer(described)
    texts = {number: text for text, number in model["vocab"].items()}
    types = {number: NORMAL for number in texts}
    for added in described["added_tokens"]:
        text = added["content"]
        texts[added["id"]] = text if pre else text.replace(SPACE, " ")
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    special = _special_ids(tokenizer)
    if pre is None:
        types |= {number: BYTE for number, text in texts.items() if re.fullmatch(BYTE_TEXT, text)}
        types |= {special["unknown"]: UNKNOWN} if "unknown" in special else {}
    count = max(size, max(texts) + 1)
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(count)]
    adds_bos, adds_eos = find_added_ends(tokenizer)
    values: dict[str, Any] = {
        "model": "gpt2" if pre else "llama",
        "pre": pre or "default",
        "tokens": tokens,
        "token_type": [types.get(number, UNUSED) for number in range(count)],
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
    }
    if pre:
        values["merges"] = [" ".join(merge) for merge in model["merges"]]
    else:
        values["scores"] = _scores_of_merges(tokens, model["merges"])
        values["add_space_prefix"] = _puts_space_in_front(described)
    values |= {f"{name}_token_id": number for name, number in special.items()}
    template = choose_chat_template(tokenizer.chat_template)
    named = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return named | ({} if template is None else {"tokenizer.chat_template": template})


def digest_tokens(metadata: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of the texts of all tokens, as llama.cpp gives them."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return hashlib.sha256("".join(f"{text}\n" for text in tokens).encode()).hexdigest()


def save_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write the files of the tokenizer that a GGUF's metadata describes.

    Raises KeyError for metadata that lacks a key, or a kind of tokenizer that is not known.
    """
    from transformers import PreTrainedTokenizerFast

    own = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    special = {
        named: own["tokens"][own[f"{name}_token_id"]]
        for name, named in SPECIAL.items()
        if f"{name}_token_id" in own
    }
    saved = PreTrainedTokenizerFast(tokenizer_object=_make_tokenizer(own, special), **special)
    saved.chat_template = metadata.get("tokenizer.chat_template")
    saved.save_pretrained(folder)


def _make_tokenizer(own: Mapping[str, Any], special: Mapping[str, str]) -> Tokenizer:
    """Return the tokenizer that a GGUF's values describe.

    own: the metadata of the tokenizer, by key without the prefix `tokenizer.ggml.`.
    special: the texts of the special tokens, by name, such as `bos_token`.
    """
    pre = {"gpt2": own.get("pre"), "llama": None}[own["model"]]
    typed = list(zip(own["tokens"], own["token_type"], strict=True))
    kept = {text: number for number, (text, kind) in enumerate(typed) if kind != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in own.get("merges", ())]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=kept,
            merges=merges if pre else _merges_of_scores(kept, own["scores"]),
            unk_token=special.get("unk_token"),
            fuse_unk=pre is None,
            byte_fallback=pre is None,
            ignore_merges=pre == "llama-bpe",
        )
    )
    if pre:
        tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
        tokenizer.decoder = decoders.ByteLevel()
    else:
        adds_space = own.get("add_space_prefix", False)
        in_front = [normalizers.Prepend(SPACE)] if adds_space else []
        tokenizer.normalizer = normalizers.Sequence([*in_front, normalizers.Replace(" ", SPACE)])
        strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, *strip])
    for kinds, add in (
        ((CONTROL, UNKNOWN), tokenizer.add_special_tokens),
        ((USER_DEFINED,), tokenizer.add_tokens),
    ):
        add([AddedToken(text, normalized=False) for text, kind in typed if kind in kinds])
    bos = [special["bos_token"]] if own.get("add_bos_token") else []
    eos = [special["eos_token"]] if own.get("add_eos_token") else []
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, "$B:1"],
            special_tokens=[(text, kept[text]) for text in (*bos, *eos)],
        )
    return tokenizer


def choose_chat_template(template: Any) -> str | None:
    """Return a tokenizer's chat template, if any; the default one where it has several."""
    chosen: str | None = template.get("default") if isinstance(template, Mapping) else template
    return chosen


def find_pre_tokenizer(described: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the rules by which a byte-level tokenizer splits a text.

    Raises ConfigError for rules that have no such name.
    """
    normalizer = (described.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp takes texts as they stand
        raise _unsupported(f"its normalizer is {normalizer}")
    rules = _reduce_steps(described.get("pre_tokenizer") or {})
    for name, pre_tokenizer in PRE_TOKENIZERS.items():
        if rules == _reduce_steps(json.loads(pre_tokenizer.__getstate__())):
            return name
    raise _unsupported(f"its rules to split a text are {json.dumps(rules):.300}")


def _reduce_steps(pre_tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer, without what changes no token."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [{key: step[key] for key in step if key != "trim_offsets"} for step in steps]


def _puts_space_in_front(described: Mapping[str, Any]) -> bool:
    """Return whether a text gets a space in front; ConfigError for rules unlike SentencePiece's."""
    normalizer = described.get("normalizer") or {}
    pre_tokenizer = described.get("pre_tokenizer") or {}
    steps = [
        *normalizer.get("normalizers", [normalizer]),
        *pre_tokenizer.get("pretokenizers", [pre_tokenizer]),
    ]
    kinds = {step["type"]: step for step in steps if step}
    if unknown := sorted(kinds.keys() - {"Prepend", "Replace", "Metaspace", "Split"}):
        raise _unsupported(f"it has the step {unknown[0]}")
    scheme = kinds.get("Metaspace", {}).get("prepend_scheme", "never")
    return "Prepend" in kinds or scheme != "never"


def _special_ids(tokenizer: Any) -> dict[str, int]:
    """Return the ids of special tokens by GGUF's names; `eot` ends an answer too, beside `eos`."""
    ids = {name: getattr(tokenizer, f"{token}_id") for name, token in SPECIAL.items()}
    others = sorted(set(tokenizer.eos_token_ids) - {ids["eos"]})
    if others:
        ids["eot"] = others[-1]
    return {name: int(token_id) for name, token_id in ids.items() if token_id is not None}


def find_added_ends(tokenizer: Any) -> tuple[bool, bool]:
    """Tell if a text is encoded with the token that begins one, and with the one that ends it."""
    plain = list(tokenizer.encode("a", add_special_tokens=False))
    whole = list(tokenizer.encode("a"))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and whole[:1] == [bos] and plain[:1] != [bos]
    adds_eos = eos is not None and whole[-1:] == [eos] and plain[-1:] != [eos]
    expected = [*([bos] if adds_bos else []), *plain, *([eos] if adds_eos else [])]
    if whole != expected:
        raise _unsupported("it adds other tokens to a text than its beginning and its end")
    return adds_bos, adds_eos


def _scores_of_merges(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Score each token by the rank of the first merge that makes it, below 0; earlier is higher."""
    ranks: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), -float(rank))
    return [ranks.get(text, LARGEST_PENALTY) for text in tokens]


def _merges_of_scores(
    vocabulary: Mapping[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Return all pairs of tokens that join to a token, those of the best score first."""
    pairs = []
    for text in sorted(vocabulary, key=lambda text: -scores[vocabulary[text]]):
        if scores[vocabulary[text]] > LARGEST_PENALTY:
            halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
            pairs += [(a, b) for a, b in halves if a in vocabulary and b in vocabulary]
    return pairs


def _unsupported(what: str) -> ConfigError:
    return ConfigError(
        f"--gguf: llama.cpp has no name for this tokenizer: {what}. Give --fused for a folder that "
        f"mlx_lm loads."
    )
