"""Strings that mean harm to whoever shows them, and what may never reach a terminal or a page."""

from __future__ import annotations

import re

MARK = "HOSTILE"  # every string holds it, so that a test can see that it was shown at all

# By what each would do if it were shown as it is.
HOSTILE: dict[str, str] = {
    "clears the screen": f"\x1b[2J\x1b[H{MARK}",
    "sets the title": f"\x1b]0;{MARK}\x07",
    "links elsewhere": f"\x1b]8;;https://example.org\x1b\\{MARK}\x1b]8;;\x1b\\",
    "colours all that follows": f"\x1b[31m{MARK}",
    "device control": f"\x1bP+q{MARK}\x1b\\",
    "resets the terminal": f"\x1bc{MARK}",
    "C1 control sequence": f"\x9b2J{MARK}",
    "C1 operating system command": f"\x9d0;{MARK}\x9c",
    "writes over the line": f"{MARK}\rpassed",
    "takes characters back": f"{MARK}\x08\x08\x08\x08",
    "rings": f"\x07{MARK}",
    "shifts the character set": f"\x0e{MARK}",
    "DEL": f"\x7f{MARK}",
    "forges a line": f"{MARK}\nFORGED: passed",
    "forges a line after CR LF": f"{MARK}\r\nFORGED: passed",
    "forges a line by NEL": f"{MARK}\x85FORGED",
    "line separator": f"{MARK}\u2028FORGED",
    "paragraph separator": f"{MARK}\u2029FORGED",
    "tabs and form feeds": f"{MARK}\t\x0b\x0c",
    "turns the text around": f"{MARK}\u202e deliaf",
    "isolates a direction": f"\u2066{MARK}\u2069",
    "marks of direction": f"\u200e\u200f\u061c{MARK}",
    "no width": f"\u200b\u200c\u200d\u2060\ufeff{MARK}",
    "soft hyphen": f"\u00ad{MARK}",
    "invisible tags": f"{MARK}\U000e0041\U000e007f",
    "fillers": f"\u3164\uffa0\u115f{MARK}\ufe0f",
    "closes rich markup": f"[/red]{MARK}",
    "rich markup": f"[bold]{MARK}[/bold]",
    "rich link": f"[link=https://example.org]{MARK}[/link]",
    "rich emoji": f":boom: {MARK}",
    "format string": f"{{0}} {{}} %s %(name)s {{check}} {MARK}",
    "markdown link": f"[{MARK}](https://example.org)",
    "markdown image": f"![{MARK}](https://example.org/a.png)",
    "table cell": f"{MARK} | passed | ||",
    "code span": f"`{MARK}` ``` {MARK}",
    "HTML": f"<img src=x onerror=alert(1)><script>{MARK}</script>&lt;",
    "emphasis": f"**{MARK}** _{MARK}_ ~~{MARK}~~",
    "bare addresses": f"{MARK} https://example.org www.example.org a@example.org",
    "quotes": f"'\"{MARK}\\",
    "half a character": f"\ud800{MARK}",
    "a byte that is not UTF-8": f"\udcff{MARK}",
    "long": MARK + "A" * 10_000,
}
# What no output may hold: C0 but for the line end, DEL, C1, marks of direction and of no width,
# separators, tags, fillers and halves of characters.
UNSAFE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u00ad\u061c\u115f\u200b-\u200f\u2028-\u202e\u2060-\u2069\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ud800-\udfff\U000e0000-\U000e01ef]"
)


def assert_safe(output: str) -> None:
    """No character that acts on a terminal, and no line that a hostile string forged."""
    assert UNSAFE.search(output) is None, ascii(output)
    forged = [line for line in output.splitlines() if line.strip("│┃ ").startswith("FORGED")]
    assert forged == []
