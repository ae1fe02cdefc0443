"""What the base reads otherwise than the text of a row: lost characters, tokens that are alike.

And turns that were written by hand for a base with a chat template.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

from nested_core.data.lines.example_parsing import Example, find_row_format
from nested_core.data.tokens.text_notes import Note, TokenizerChecks
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import DamagedError
from nested_core.models.base_model import fingerprint_base_model, has_two_templates
from nested_core.models.chat_template import FIXED_DATE, has_chat_template, stopped_clock
from nested_core.storage.safetensors_files import read_header
from nested_core.storage.untrusted_files import UNBOUNDED, collect_strings, open_regular

# A question's mark at the beginning of a text, or with hashes anywhere, and an answer's after it.
_HANDWRITTEN_TURNS_PATTERN = re.compile(
    r"(?is)(?:\A[\s*#]*(?:question|instruction|user|human|q)\b|###\s*(?:instruction|question|user|human)\b)"
    r"[\s*]{0,3}:.*?\b(?:answer|response|assistant|output|bot|a)\b[\s*]{0,3}:"
)
_JUDGED_CATEGORIES = "LNPS"  # letters, numbers, punctuation, symbols (unicodedata)
MAX_LOST_PER_ROW = 3
WORD = "Berlin"  # an example of its case
_ZERO_BYTES = b"\0\x80\x08\x88"  # of 0.0 and -0.0 in each type of floats, four bits too
_EMBEDDING_PATTERN = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|tok_embeddings)\.(?:weight|scales|biases)$"
)


class TokenNotes:
    """Notes on an example's texts that need the base's tokenizer, or its embedding."""

    def __init__(self, source: TokenizerSource) -> None:
        """Load the tokenizer, and read which of its added tokens have rows alike."""
        self._tokenizer = source.load()
        self._has_template = has_chat_template(self._tokenizer)
        self._has_two_templates = has_two_templates(Path(source.folder))
        self._clock = stopped_clock(self._tokenizer) or stopped_clock(self._tokenizer, tools=[])
        added = sorted(getattr(self._tokenizer, "added_tokens_decoder", {}))
        self._alike = find_tokens_alike(Path(source.folder), added)
        self._read, self._is_other_case = cache(self._read_back), cache(self._has_other_case)
        self._read_instead = cache(self._find_read_instead)

    @staticmethod
    def depends_on(source: TokenizerSource) -> str | None:
        """Return what the notes depend on beside the tokenizer: the fingerprint of the base.

        None if the tokenizer lies in a folder without a model.
        """
        folder = Path(source.folder)
        return fingerprint_base_model(folder) if (folder / "config.json").is_file() else None

    def __call__(self, example: Example, tokens: Sequence[int]) -> list[Note]:
        """Return a note for each lost character, for each token alike, for handwritten turns."""
        characters = sorted(set().union(example.text, *collect_strings(example.messages)))
        pairs = [(one, self._read_instead(one)) for one in characters]
        lost = [_describe_lost(one, read) for one, read in pairs if read is not None]
        notes = [Note("warning", "lost-character", text) for text in lost[:MAX_LOST_PER_ROW]]
        notes += [
            Note("warning", "tokens-alike", self._describe_alike(token))
            for token in sorted(self._alike.intersection(tokens))
        ]
        if any(map(self._is_other_case, characters)):
            word = self._read(WORD).strip()
            notes.append(Note("warning", "case-lost", _CASE_MESSAGE.format(word=word)))
        is_plain_text = not find_row_format(example.format).is_templated
        if self._clock and not is_plain_text:
            notes.append(Note("warning", "date-in-prompt", _DATE_MESSAGE))
        if self._has_two_templates and not is_plain_text:
            notes.append(Note("warning", "two-templates", _TEMPLATES_MESSAGE))
        if is_plain_text and self._has_template and _HANDWRITTEN_TURNS_PATTERN.search(example.text):
            notes.append(Note("warning", "handwritten-turns", _HANDWRITTEN_TURNS_MESSAGE))
        return notes

    def _read_back(self, text: str) -> str:
        """Return what a text's tokens decode to."""
        read: str = self._tokenizer.decode(self._tokenizer.encode(text, add_special_tokens=False))
        return read

    def _has_other_case(self, character: str) -> bool:
        """Return whether a letter's tokens decode to the capital of it, or to its small letter."""
        other = character.swapcase()
        return other != character not in self._read(character) and other in self._read(character)

    def _find_read_instead(self, character: str) -> str | None:
        """Return what a character's tokens decode to; None for the character, in whatever case.

        A normaliser may write letters and punctuation otherwise, but no number and no symbol. The
        unknown token is never the character, also not one of those it is written with (`<unk>`).
        """
        category = unicodedata.category(character)[0]
        if category not in _JUDGED_CATEGORIES:
            return None
        read = self._read(character)
        tokens = self._tokenizer.encode(character, add_special_tokens=False)
        is_unknown = self._tokenizer.unk_token_id in tokens
        normalize = partial(unicodedata.normalize, "NFC" if category in "NS" else "NFKC")
        is_given_back = normalize(character).casefold().strip() in normalize(read).casefold()
        return None if is_given_back and not is_unknown else read

    def _describe_alike(self, token: int) -> str:
        """Say what is wrong with a token's row of the embedding."""
        return (
            f"{self._tokenizer.convert_ids_to_tokens(token)} (token {token}) is nothing that the "
            f"base knows: its row of the embedding is zero, or equal to that of another added "
            f"token. LoRA on linear layers leaves that as it is. Give it a row of its own in the "
            f"base, train model.embed_tokens too (lora_parameters.keys), or write it in letters"
        )


def find_tokens_alike(folder: Path, tokens: Sequence[int]) -> frozenset[int]:
    """Return the tokens whose rows of a base's embedding are zero, or equal to another one's.

    tokens: ids. Of a quantised embedding the rows of all its arrays are compared; a row is zero if
    its codes and biases are zero, whatever its scales. Weights that cannot be read are judged
    where they are loaded.
    """
    rows, values = dict.fromkeys(tokens, b""), dict.fromkeys(tokens, b"")
    with suppress(OSError, DamagedError):
        for path in sorted(folder.glob("*.safetensors")) if tokens else ():
            with open_regular(path, UNBOUNDED, follow_links=True) as (file, size):
                for name, tensor in read_header(file, size, path).items():
                    if _EMBEDDING_PATTERN.search(name) is None:
                        continue
                    count = tensor.shape[0] if tensor.shape else 0
                    for token in (token for token in tokens if token < count):
                        width = (tensor.end - tensor.begin) // count
                        file.seek(tensor.begin + token * width)
                        row = file.read(width)
                        rows[token] += row
                        values[token] += b"" if name.endswith(".scales") else row
    counts = Counter(rows.values())
    return frozenset(
        token
        for token, row in rows.items()
        if row and (counts[row] > 1 or not values[token].strip(_ZERO_BYTES))
    )


def _describe_lost(character: str, read: str) -> str:
    """Say what becomes of a character. read: what its tokens decode to."""
    return (
        f"{character} (U+{ord(character):04X}) is lost: the tokenizer gives back {read!r} for it, "
        f"so the model neither sees nor writes it. Take the tokenizer that belongs to the base, or "
        f"write it in characters that the tokenizer knows"
    )


_HANDWRITTEN_TURNS_MESSAGE = (
    "turns written by hand (such as `Question: ... Answer: ...`) in plain text, for a base with a "
    "chat template: served as chat, the adapter would read another text than it learnt. Write "
    "such rows as messages, or ask it by plain text alone"
)


_CASE_MESSAGE = (
    f"the tokenizer gives back {{word!r}} for {WORD!r}: the model neither sees the case of letters "
    f"nor writes it. Unless the base learnt so, take the tokenizer that belongs to it"
)


_TEMPLATES_MESSAGE = (
    "tokenizer_config.json of the base has another chat template than its chat_template.jinja, "
    "which is used here: programs that read the former ask otherwise than is learnt. Take out the "
    "one that is wrong"
)


_DATE_MESSAGE = (
    f"the chat template writes today's date, so that a conversation has another prompt each day. "
    f"Here it writes {FIXED_DATE:%d %B %Y} on every day; other programs write the day they run on. "
    f"Give the base a template without a date, or with one that stays"
)


CHECKS = TokenizerChecks(TokenNotes, TokenNotes.depends_on)
