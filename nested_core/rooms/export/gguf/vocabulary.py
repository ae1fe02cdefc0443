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
            make_pre_tokenizer(pre)  # ValueError for rules that are not known here
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

    def list_ends(self) -> list[int]:
        """List the tokens at which an answer ends."""
        return [self.special[key] for key in ("eos", "eot") if key in self.special]

    def save_tokenizer(self, folder: Path) -> None:
        """Write the files of a tokenizer that encodes as llama.cpp does with this vocabulary."""
        from transformers import PreTrainedTokenizerFast

        keys = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token"}
        keys["padding"] = "pad_token"
        special = {keys[key]: self.tokens[id_] for key, id_ in self.special.items() if key in keys}
        saved = PreTrainedTokenizerFast(tokenizer_object=self._make_tokenizer(), **special)
        saved.chat_template = self.chat_template
        saved.save_pretrained(folder)

    def _make_tokenizer(self) -> Tokenizer:
        typed = list(zip(self.tokens, self.types, strict=True))
        kept = {text: number for number, (text, kind) in enumerate(typed) if kind != UNUSED}
        unknown = self.special.get("unknown")
        tokenizer = Tokenizer(
            models.BPE(
                vocab=kept,
                merges=list(self.merges or _merges_of_scores(kept, self.scores)),
                unk_token=None if unknown is None else self.tokens[unknown],
                fuse_unk=self.pre is None,
                byte_fallback=self.pre is None,
                ignore_merges=self.pre == "llama-bpe",
            )
        )
        if self.pre:
            tokenizer.pre_tokenizer = make_pre_tokenizer(self.pre)
            tokenizer.decoder = decoders.ByteLevel()
        else:
            in_front = [normalizers.Prepend(SPACE)] if self.adds_space else []
            tokenizer.normalizer = normalizers.Sequence(
                [*in_front, normalizers.Replace(" ", SPACE)]
            )
            strip = [decoders.Strip(" ", 1, 0)] if self.adds_space else []
            steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
            tokenizer.decoder = decoders.Sequence([*steps, *strip])
        for kinds, add in (
            ((CONTROL, UNKNOWN), tokenizer.add_special_tokens),
            ((USER_DEFINED,), tokenizer.add_tokens),
        ):
            add([AddedToken(text, normalized=False) for text, kind in typed if kind in kinds])
        bos = [self.special["bos"]] if self.adds_bos else []
        eos = [self.special["eos"]] if self.adds_eos else []
        if bos or eos:
            parts = [*(self.tokens[id_] for id_ in bos), "$A", *(self.tokens[id_] for id_ in eos)]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=parts,
                pair=[*parts, "$B:1"],
                special_tokens=[(self.tokens[id_], id_) for id_ in (*bos, *eos)],
            )
        return tokenizer


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
    """Find llama.cpp's name of the rules by which a byte-level tokenizer splits a text.

    Raises ConfigError for rules that it has no name for.
    """
    normalizer = (described.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp takes texts as they stand
        raise _unsupported(f"its normalizer is {normalizer}")
    given = _reduce_steps(described.get("pre_tokenizer") or {})
    for name in ("gpt-2", "smollm", *SPLIT_PATTERNS):
        if given == _reduce_steps(json.loads(make_pre_tokenizer(name).__getstate__())):
            return name
    raise _unsupported(f"its rules to split a text are {json.dumps(given):.300}")


def make_pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """Make what splits a text by the rules of a name of llama.cpp's; ValueError without any."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "gpt-2":
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name not in SPLIT_PATTERNS:
        raise ValueError(f"tokenizer.ggml.pre is {name:.40}")
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERNS[name]), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, plain])


def _reduce_steps(pre_tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer, without what changes no token."""
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
