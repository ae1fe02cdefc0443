"""Builds HTML that foreign text cannot change: every string is escaped unless made here.

A page is one file without scripts and without anything to fetch; its content security policy
forbids both. Content that is too wide scrolls by itself.

page.css is the style of every page: colours as variables, light and dark, readable at a phone's
width. Its selectors are specific enough to hold in a notebook, whose own style reaches into its
cells. Colours of text have a contrast of at least 4.5 to their background, those of curves 3.
"""

from __future__ import annotations

import html
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from nested_core.text.foreign_text import escape_but_keep_newlines
from nested_core.text.value_format import format_value

STYLE = Path(__file__).with_name("page.css").read_text("utf-8")

# Of an element: in text a quotation mark is escaped.
_ID_ATTRIBUTE = re.compile(r'\b(id|aria-labelledby)="([a-z-]+)"')
CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Html(str):
    """Markup made by this module, which is not escaped again."""

    __slots__ = ()


def escaped_html(value: object) -> Html:
    """Escape a value for HTML; markup is returned as it is, None becomes a dash.

    Integers get thousands separators. Non-printing characters are shown as escapes, such as \\x1b;
    line ends stay.
    """
    if isinstance(value, Html):
        return value
    text = "–" if value is None else format_value(value)
    if isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:,}"
    return Html(html.escape(escape_but_keep_newlines(text)))


def element(tag: str, *children: object, **attributes: str) -> Html:
    """Build `<tag attributes>children</tag>`, with attributes and children escaped.

    attributes: `class_` stands for class, and `_` within a name for `-`. An empty value leaves the
        attribute out.
    """
    pairs = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escaped_html(value)}"'
        for name, value in attributes.items()
        if value
    )
    return Html(f"<{tag}{pairs}>{join(children)}</{tag}>")


def join(parts: Iterable[object]) -> Html:
    """Concatenate the parts, each escaped unless it is markup."""
    return Html("".join(map(escaped_html, parts)))


def preformatted(label: str, text: str) -> Html:
    """Build a block of preformatted text, as in a file or a terminal."""
    return element("pre", element("code", text), role="group", tabindex="0", aria_label=label)


def collapsed(summary: str, content: Html) -> Html:
    """Build content that is hidden until the reader opens it."""
    return element("details", element("summary", summary), content)


def section(identifier: str, heading: str, *content: object) -> Html:
    """Build a section of a page with a heading, as a landmark for screen readers."""
    title = f"{identifier}-heading"
    return element(
        "section", element("h2", heading, id=title), *content, id=identifier, aria_labelledby=title
    )


def paragraph(*content: object, class_: str = "") -> Html:
    """Build a paragraph."""
    return element("p", *content, **({"class_": class_} if class_ else {}))


def notebook_fragment(*content: object) -> Html:
    """Build markup with its style for a notebook's cell, with identifiers unique to the cell."""
    style = Html(f"<style>\n{STYLE}</style>")
    unique = _ID_ATTRIBUTE.sub(rf'\1="\2-{secrets.token_hex(4)}"', join(content))
    return element("div", style, Html(unique), class_="nested-tune")


def page(title: str, *content: object) -> str:
    """Build a whole page: one file that runs nothing and fetches nothing."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n'
        f'<meta name="referrer" content="no-referrer">\n'
        f"<title>{escaped_html(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n"
        f'<body class="nested-tune">\n{join(content)}\n</body>\n</html>\n'
    )


def cut(value: str, limit: int) -> str:
    """Cut a text after `limit` characters, with an ellipsis if something is left out."""
    return value if len(value) <= limit else f"{value[:limit]} …"
