"""HTML that text of others cannot change: every string is escaped unless these functions made it.

A page is one file without scripts and without anything to fetch; its content security policy
forbids both. What is too wide scrolls by itself.
"""

from __future__ import annotations

import html
import re
import secrets
from collections.abc import Iterable

from nested_core.text.foreign_text import escape_but_keep_newlines
from nested_core.text.html_style import STYLE
from nested_core.text.value_format import format_value

# Of an element: in text a quotation mark is escaped.
_ID_ATTRIBUTE = re.compile(r'\b(id|aria-labelledby)="([a-z-]+)"')
CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Html(str):
    """Markup made by this module: put on a page as it stands."""

    __slots__ = ()


def escaped_html(value: object) -> Html:
    """The value itself if it is markup, else its text escaped; None is a dash.

    Of whole numbers thousands are separated. What does not print is shown as an escape, such as
    \\x1b; line ends stay.
    """
    if isinstance(value, Html):
        return value
    text = "–" if value is None else format_value(value)
    if isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:,}"
    return Html(html.escape(escape_but_keep_newlines(text)))


def element(tag: str, *children: object, **attributes: str) -> Html:
    """`<tag attributes>children</tag>`; `class_` is class, `_` in a name is `-`; none is ""."""
    pairs = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escaped_html(value)}"'
        for name, value in attributes.items()
        if value
    )
    return Html(f"<{tag}{pairs}>{join(children)}</{tag}>")


def join(parts: Iterable[object]) -> Html:
    """The parts one after the other."""
    return Html("".join(map(escaped_html, parts)))


def scrolling(label: str, content: Html) -> Html:
    """Content that scrolls sideways within itself, by keyboard too."""
    return element("div", content, class_="scroll", role="group", tabindex="0", aria_label=label)


def preformatted(label: str, text: str) -> Html:
    """Text as it would stand in a file or a terminal."""
    code = element("code", text)
    return element("pre", code, role="group", tabindex="0", aria_label=label)


def collapsed(summary: str, content: Html) -> Html:
    """Content that a reader opens."""
    return element("details", element("summary", summary), content)


def section(identifier: str, heading: str, *content: object) -> Html:
    """A section of a page: a landmark with its heading."""
    title = f"{identifier}-heading"
    return element(
        "section", element("h2", heading, id=title), *content, id=identifier, aria_labelledby=title
    )


def paragraph(*content: object, class_: str = "") -> Html:
    """A paragraph."""
    return element("p", *content, **({"class_": class_} if class_ else {}))


def notebook_fragment(*content: object) -> Html:
    """Markup with its style for a notebook's cell; no other cell has the same identifiers."""
    style = Html(f"<style>{STYLE}</style>")
    unique = _ID_ATTRIBUTE.sub(rf'\1="\2-{secrets.token_hex(4)}"', join(content))
    return element("div", style, Html(unique), class_="nested-tune")


def page(title: str, *content: object) -> str:
    """A whole page: one file that runs nothing and fetches nothing."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n'
        f'<meta name="referrer" content="no-referrer">\n'
        f"<title>{escaped_html(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f'<body class="nested-tune">\n{join(content)}\n</body>\n</html>\n'
    )


def truncated_text(value: str, limit: int = 400) -> Html:
    """Text of others in its own lines, cut after `limit` characters."""
    return element("span", cut(value, limit), class_="text")


def cut(value: str, limit: int) -> str:
    """The text without what follows `limit` characters, which it says by an ellipsis."""
    return value if len(value) <= limit else f"{value[:limit]} …"
