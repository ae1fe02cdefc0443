"""A tokenizer as GGUF stores it: made of a Hugging Face one, and turned back into one.

llama.cpp knows how a text is split by a name (`tokenizer.ggml.pre`) and has the rules in its code,
so a tokenizer with other rules cannot be written. Byte-level BPE goes with its merges; BPE in the
manner of SentencePiece goes with a score a token, which is the rank of the merge that makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nested_core.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
SPACE = "▁"  # of SentencePiece
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_PATTERNS = {
    "llama-bpe": rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|\p{{N}}{_REST}",
}
LARGEST_PENALTY = -1e6  # the score of a token that no merge makes


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and rules of a tokenizer.

    pre: llama.cpp's name of how texts are split; None in the manner of SentencePiece.
    types: llama.cpp's type of each token.
    merges: pairs of tokens, the first ones first; empty in the manner of SentencePiece.
    scores: of each token, in the manner of SentencePiece; else empty.
    special: the ids of the tokens bos, eos, eot, unknown and padding, those that there are.
    adds_bos, adds_eos: whether a text is encoded with them.
    adds_space: whether a text gets a space in front, in the manner of SentencePiece.
    """

    pre: str | None
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[tuple[str, str], ...]
    scores: tuple[float, ...]
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    adds_space: bool
    chat_template: str | None

    @classmethod
    def of_tokenizer(cls, tokenizer: Any, size: int) -> Vocabulary:
        """The vocabulary of mlx_lm's tokenizer, with unused tokens up to `size`.

        Raises ConfigError, by name, for rules that llama.cpp has no name for.
        """
        described = describe_tokenizer(tokenizer)
        model = described["model"]
        if model["type"] != "BPE":
            raise _unsupported(f"its model is {model['type']}, not BPE")
        is_sentencepiece = bool(model.get("byte_fallback"))
        pre = None if is_sentencepiece else find_pre_tokenizer(described)
        texts = {number: text for text, number in model["vocab"].items()}
        types = {number: NORMAL for number in texts}
        for added in described["added_tokens"]:
            text = added["content"]
            texts[added["id"]] = text if pre else text.replace(SPACE, " ")
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if is_sentencepiece:
            types |= {number: BYTE for number, text in texts.items() if _is_byte(text)}
        ids = _special_ids(tokenizer)
        if "unknown" in ids:
            types[ids["unknown"]] = UNKNOWN if is_sentencepiece else types[ids["unknown"]]
        merges = tuple(_read_merge(merge) for merge in model["merges"])
        count = max(size, max(texts) + 1)
        tokens = tuple(texts.get(number, f"[PAD{number}]") for number in range(count))
        adds_bos, adds_eos = _find_added_ends(tokenizer)
        return cls(
            pre=pre,
            tokens=tokens,
            types=tuple(types.get(number, UNUSED) for number in range(count)),
            merges=() if is_sentencepiece else merges,
            scores=_scores_of_merges(tokens, merges) if is_sentencepiece else (),
            special=ids,
            adds_bos=adds_bos,
            adds_eos=adds_eos,
            adds_space=is_sentencepiece and _puts_space_in_front(described),
            chat_template=read_chat_template(tokenizer),
        )

    def digest(self) -> str:
        """SHA-256 of the texts of all tokens, as llama.cpp gives them."""
        return hashlib.sha256("".join(f"{text}\n" for text in self.tokens).encode()).hexdigest()

    def metadata(self) -> dict[str, Any]:
        """The vocabulary by GGUF's keys."""
        keys = {"unknown": "unknown_token_id", "padding": "padding_token_id"}
        values: dict[str, Any] = {
            "model": "gpt2" if self.pre else "llama",
            "pre": self.pre or "default",
            "tokens": list(self.tokens),
            "token_type": list(self.types),
            "add_bos_token": self.adds_bos,
            "add_eos_token": self.adds_eos,
        }
        values |= {keys.get(name, f"{name}_token_id"): id_ for name, id_ in self.special.items()}
        if self.pre:
            values["merges"] = [f"{first} {second}" for first, second in self.merges]
        else:
            values["scores"] = list(self.scores)
            values["add_space_prefix"] = self.adds_space
        named = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
        template = self.chat_template
        return named | ({} if template is None else {"tokenizer.chat_template": template})

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """The vocabulary of a GGUF; KeyError or ValueError for one that is not written here."""

        def own(key: str, default: Any = None) -> Any:
            return metadata.get(f"tokenizer.ggml.{key}", default)

        is_sentencepiece = {"gpt2": False, "llama": True}[own("model")]
        pre = None if is_sentencepiece else str(own("pre"))
        if pre is not None:
            pre_tokenizer_of(pre)
        keys = ("bos", "eos", "eot", "unknown", "padding")
        merges = (merge.split(" ") for merge in own("merges", ()))
        return cls(
            pre=pre,
            tokens=tuple(metadata["tokenizer.ggml.tokens"]),
            types=tuple(map(int, metadata["tokenizer.ggml.token_type"])),
            merges=tuple((first, second) for first, second in merges),
            scores=tuple(map(float, own("scores", ()))),
            special={key: int(id_) for key in keys if (id_ := own(f"{key}_token_id")) is not None},
            adds_bos=bool(own("add_bos_token", False)),
            adds_eos=bool(own("add_eos_token", False)),
            adds_space=bool(own("add_space_prefix", False)),
            chat_template=metadata.get("tokenizer.chat_template"),
        )

    def tokenizer_json(self) -> dict[str, Any]:
        """tokenizer.json of a tokenizer that encodes as llama.cpp does with this vocabulary."""
        added = [
            {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }
            for number, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (CONTROL, USER_DEFINED, UNKNOWN)
        ]
        kept = {
            text: number
            for number, (text, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind != UNUSED
        }
        merges = self.merges or _merges_of_scores(kept, self.scores)
        space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        in_front = {"type": "Prepend", "prepend": SPACE}
        unknown = self.special.get("unknown")
        return {
            "version": "1.0",
            "added_tokens": added,
            "normalizer": None
            if self.pre
            else {
                "type": "Sequence",
                "normalizers": [in_front, space] if self.adds_space else [space],
            },
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizer_of(self.pre)}
            if self.pre
            else None,
            "post_processor": self._post_processor(),
            "decoder": self._decoder(),
            "model": {
                "type": "BPE",
                "unk_token": None if unknown is None else self.tokens[unknown],
                "fuse_unk": self.pre is None,
                "byte_fallback": self.pre is None,
                "ignore_merges": self.pre == "llama-bpe",
                "vocab": kept,
                "merges": [list(pair) for pair in merges],
            },
        }

    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json beside it."""
        names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token"}
        named = names | {"padding": "pad_token"}
        config = {named[key]: self.tokens[id_] for key, id_ in self.special.items() if key in named}
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
        return plain | {"clean_up_tokenization_spaces": False} | config | template

    def _post_processor(self) -> dict[str, Any] | None:
        if not self.adds_bos and not self.adds_eos:
            return None
        ends = [key for key, adds in (("bos", self.adds_bos), ("eos", self.adds_eos)) if adds]
        texts = {key: self.tokens[self.special[key]] for key in ends}
        parts: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
        if self.adds_bos:
            parts.insert(0, {"SpecialToken": {"id": texts["bos"], "type_id": 0}})
        if self.adds_eos:
            parts.append({"SpecialToken": {"id": texts["eos"], "type_id": 0}})
        special = {
            text: {"id": text, "ids": [self.special[key]], "tokens": [text]}
            for key, text in texts.items()
        }
        pair = [*parts, {"Sequence": {"id": "B", "type_id": 1}}]
        return {
            "type": "TemplateProcessing",
            "single": parts,
            "pair": pair,
            "special_tokens": special,
        }

    def _decoder(self) -> dict[str, Any]:
        if self.pre:
            byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
            return {"type": "ByteLevel"} | byte_level
        spaces = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        steps: list[dict[str, Any]] = [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}]
        if self.adds_space:
            steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {"type": "Sequence", "decoders": steps}


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json of the tokenizer in use; ConfigError for one that has no fast form."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unsupported("it is none of the `tokenizers` library")
    described: dict[str, Any] = json.loads(backend.to_str())
    return described


def read_chat_template(tokenizer: Any) -> str | None:
    """The chat template of a tokenizer; the default one where it has several."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return None if template is None else str(template)


def find_pre_tokenizer(described: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rules by which a byte-level tokenizer splits a text.

    Raises ConfigError for rules that it has no name for.
    """
    normalizer = (described.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp takes texts as they stand
        raise _unsupported(f"its normalizer is {normalizer}")
    given = _reduce_steps(described.get("pre_tokenizer") or {})
    for name in ("gpt-2", "smollm", *SPLIT_PATTERNS):
        if given == _reduce_steps({"type": "Sequence", "pretokenizers": pre_tokenizer_of(name)}):
            return name
    raise _unsupported(f"its rules to split a text are {json.dumps(given):.300}")


def pre_tokenizer_of(name: str) -> list[dict[str, Any]]:
    """The steps of the `tokenizers` library for a name of llama.cpp's; ValueError without any."""
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if name == "gpt-2":
        return [plain | {"use_regex": True}]
    if name == "smollm":
        return [{"type": "Digits", "individual_digits": True}, plain | {"use_regex": True}]
    if name not in SPLIT_PATTERNS:
        raise ValueError(f"tokenizer.ggml.pre is {name:.40}")
    split = {
        "type": "Split",
        "pattern": {"Regex": SPLIT_PATTERNS[name]},
        "behavior": "Isolated",
        "invert": False,
    }
    return [split, plain | {"use_regex": False}]


def _reduce_steps(pre_tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without what changes no token."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [{key: step[key] for key in step if key != "trim_offsets"} for step in steps]


def _puts_space_in_front(described: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front; ConfigError for rules that are not SentencePiece's."""
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
    """The ids of special tokens by GGUF's names; eot is another end of an answer than eos."""
    given = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    others = sorted(set(tokenizer.eos_token_ids) - {given["eos"]})
    if others:
        given["eot"] = others[-1]
    return {name: int(id_) for name, id_ in given.items() if id_ is not None}


def _find_added_ends(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text is encoded with the token that begins one, and with the one that ends it."""
    plain = list(tokenizer.encode("a", add_special_tokens=False))
    whole = list(tokenizer.encode("a"))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and whole[:1] == [bos] and plain[:1] != [bos]
    adds_eos = eos is not None and whole[-1:] == [eos] and plain[-1:] != [eos]
    expected = [*([bos] if adds_bos else []), *plain, *([eos] if adds_eos else [])]
    if whole != expected:
        raise _unsupported("it adds other tokens to a text than its beginning and its end")
    return adds_bos, adds_eos


def _read_merge(merge: str | Sequence[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _scores_of_merges(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]]
) -> tuple[float, ...]:
    """Of each token the rank of the first merge that makes it, below 0; earlier is higher."""
    ranks: dict[str, float] = {}
    for rank, (first, second) in enumerate(merges):
        ranks.setdefault(first + second, -float(rank))
    return tuple(ranks.get(text, LARGEST_PENALTY) for text in tokens)


def _merges_of_scores(
    vocabulary: Mapping[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token together, in the order of its score."""
    ranked = sorted(vocabulary, key=lambda text: -scores[vocabulary[text]])
    pairs = []
    for text in ranked:
        if scores[vocabulary[text]] > LARGEST_PENALTY:
            cuts = range(1, len(text))
            halves = ((text[:cut], text[cut:]) for cut in cuts)
            pairs += [(a, b) for a, b in halves if a in vocabulary and b in vocabulary]
    return pairs


def _unsupported(what: str) -> ConfigError:
    return ConfigError(
        f"--gguf: llama.cpp has no name for this tokenizer: {what}. Give --fused for a folder that "
        f"mlx_lm loads."
    )
