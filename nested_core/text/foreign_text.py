"""Text from others (data, adapters, file names, configurations), made safe to display.

Nothing in it may move the cursor, clear the screen, set a title, reverse or hide other text, or
become markup.
"""

from __future__ import annotations

import re

# Characters that print nothing and that str.isprintable lets through: fillers and variation
# selectors (Unicode's Default_Ignorable_Code_Point).
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Whatever begins or ends a construct of CommonMark, or of GitHub's additions to it, in a line: "_"
# not within a word, and what makes a bare address a link.
_MARKDOWN_SYNTAX = re.compile(
    r"[\\`*\[\]<>|~&@]|(?<![^\W_])_|_(?![^\W_])|(?<=:)//|(?<=www)\.|^[#+-]", re.IGNORECASE
)


def escape(text: str) -> str:
    """Return the text on one line with every non-printing character escaped, such as \\x1b.

    These are control characters (C0, C1, line ends), marks of direction and of no width, lone
    surrogates (shown as the byte of a file name that is not UTF-8) and unassigned characters.
    """
    if text.isprintable() and _INVISIBLE.search(text) is None:
        return text
    return "".join(map(_escape_character, text))


def escape_but_keep_newlines(text: str) -> str:
    """Escape every non-printing character except the text's own line ends."""
    if "\n" not in text:
        return escape(text)
    return "\n".join(map(escape, text.split("\n")))


def escape_markdown(text: str) -> str:
    """Escape text for Markdown, so that it is displayed literally in a page or a table cell."""
    return _MARKDOWN_SYNTAX.sub(r"\\\g<0>", escape(text))


def _escape_character(character: str) -> str:
    """Return a character, or its escape such as \\x1b if it does not print."""
    if character.isprintable() and _INVISIBLE.match(character) is None:
        return character
    if character in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[character]
    code = ord(character)
    if character.isspace() and code >= 0xA0 and code not in (0x2028, 0x2029):
        return character  # spaces of other widths, as texts of many languages have them
    if code in range(0xDC80, 0xDD00):
        return f"\\x{code - 0xDC00:02x}"  # os.fsdecode: a byte that is not UTF-8
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
