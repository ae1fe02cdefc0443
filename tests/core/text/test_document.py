"""A document's three renderings: each block in each, and text of others that is markup in none."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from nested_core.text.document import (
    Block,
    Cell,
    Code,
    Details,
    Document,
    Facts,
    Figures,
    Section,
    Table,
    Text,
    to_html,
    to_markdown,
    to_terminal,
)
from nested_core.text.html_markup import CONTENT_SECURITY_POLICY
from nested_core.text.svg_chart import Chart, Curve, Point
from tests.hostile_text import HOSTILE, MARK, UNSAFE

CHART = Chart("Loss", "step", "nats", [Curve("training", [Point(1, 2.0), Point(2, 1.0)])])
BLOCKS: dict[str, Block] = {
    "text": Text("a & b", "bad", is_headline=True),
    "facts": Facts([("run", 3), ("page", Cell("night", path="/runs/1"))]),
    "code": Code("Command", "train \\\n  -c x"),
    "table": Table(
        "What was", ("a", "b"), [("x", 0.12345), ("y", None), ("z", Cell(1, "bad", "✗"))]
    ),
    "heat": Table("Map", ("layer", "q"), [("layer 0", Cell("0.5", "bad", heat=0.5))]),
    "figures": Figures([[CHART]]),
    "details": Details("More", [Text("inside")]),
    "section": Section("Heading", [Text("inside"), Section("Smaller", [])], "name"),
}
HTML = {
    "text": '<p class="verdict bad">a &amp; b</p>',
    "facts": "<div><dt>run</dt><dd>3</dd></div><div><dt>page</dt><dd>night</dd></div>",
    "code": "<code>train \\\n  -c x</code>",
    "table": "<tr><th scope=row>x<td class=n>0.1235\n<tr><th scope=row>y<td>–\n"
    '<tr><th scope=row>z<td><small class="bad">✗</small> 1\n',
    "heat": '<td class="bad" style="background:rgba(var(--heat),0.28)">0.5',
    "figures": "<summary>The numbers</summary>",
    "details": "<details><summary>More</summary><p>inside</p></details>",
    "section": '<section id="name" aria-labelledby="name-heading">'
    '<h2 id="name-heading">Heading</h2><p>inside</p><h3>Smaller</h3></section>',
}
MARKDOWN = {
    "text": "a \\& b\n",
    "facts": "- **run**: 3\n- **page**: [night](/runs/1)\n",
    "code": "    train \\\n      -c x\n",
    "table": "What was\n\n| a | b |\n|---|---|\n| x | 0.1235 |\n| y | \\- |\n| z | ✗ 1 |\n",
    "heat": "Map\n\n| layer | q |\n|---|---|\n| layer 0 | 0.5 |\n",
    "details": "## More\n\ninside\n",
    "section": "## Heading\n\ninside\n\n### Smaller\n",
}
TERMINAL = {
    "text": ["a & b"],
    "facts": ["run: 3", "page: night"],
    "code": [],
    "table": [Table("What was", ("a", "b"), [["x", 0.12345], ["y", None], ["z", "✗ 1"]])],
    "figures": [],
    "details": [],
    "section": ["Heading", "inside", "Smaller"],
}


@pytest.mark.parametrize("name", HTML)
def test_a_block_is_markup_on_a_page(name: str) -> None:
    assert HTML[name] in to_html(BLOCKS[name])


@pytest.mark.parametrize("name", MARKDOWN)
def test_a_block_is_lines_of_markdown(name: str) -> None:
    assert "\n".join(to_markdown(BLOCKS[name])) == MARKDOWN[name]


@pytest.mark.parametrize("name", TERMINAL)
def test_a_block_is_lines_and_tables_of_a_terminal(name: str) -> None:
    assert list(to_terminal(BLOCKS[name])) == TERMINAL[name]


def test_a_picture_of_markdown_is_within_it_and_one_without_a_point_is_left_out() -> None:
    (line, _) = to_markdown(BLOCKS["figures"])
    data = PICTURE.fullmatch(line)
    assert data is not None
    assert base64.b64decode(data[1]).startswith(b"<svg")
    empty = Chart("Loss", "step", "nats", [Curve("training", [Point(1, None)])])
    assert list(to_markdown(Figures([[empty]]))) == []


PICTURE = re.compile(r"!\[(?:\\.|[^\[\]\\])*\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)")


class Page(HTMLParser):
    """The elements of a page, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def document_of(text: str) -> Document:
    """A document with a text of others at each place that can hold one."""
    blocks: list[Block] = [
        Text(text),
        Facts([(text, text)]),
        Code(text, text),
        Table(text, (text, text), [(text, Cell(text, "bad", text)), (text, Cell(text, heat=1.0))]),
        Figures([[Chart(text, text, text, [Curve(text, [Point(1, 2.0)]), *CHART.curves])]]),
        Details(text, [Text(text)]),
        Section(text, [Section(text, [Text(text)])], "name"),
    ]
    return Document(text, blocks, above=text, below=text)


@pytest.mark.parametrize("attack", HOSTILE)
def test_text_of_others_is_shown_on_a_page_and_does_nothing(attack: str) -> None:
    written = document_of(HOSTILE[attack]).to_html()
    page = Page(written)
    assert UNSAFE.search(written) is None
    assert page.words.count(MARK) >= 15
    names = [tag for tag, _ in page.tags]
    assert {*names}.isdisjoint({"script", "img", "link", "iframe", "object", "a", "base"})
    assert names.count("style") == 1
    assert [a["content"] for _, a in page.tags if a.get("http-equiv")] == [CONTENT_SECURITY_POLICY]
    assert CONTENT_SECURITY_POLICY.startswith("default-src 'none'")
    attributes = {name for _, values in page.tags for name in values}
    assert not {name for name in attributes if name.startswith("on") or name in ("src", "href")}


@pytest.mark.parametrize("attack", HOSTILE)
def test_text_of_others_is_no_markup_in_markdown(attack: str) -> None:
    lines = str(document_of(HOSTILE[attack])).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    for line in lines:
        assert UNSAFE.search(line) is None
        if line.startswith("!["):
            assert PICTURE.fullmatch(line)
        elif not line.startswith("    "):  # code, in which nothing is markup
            for markup in ("](", "<img", "<script", "https://", "www."):
                assert re.search(rf"(?<!\\){re.escape(markup)}", line) is None, line


def test_a_wide_cell_of_markdown_goes_on_in_the_next_row_so_that_a_window_holds_it() -> None:
    lines = list(to_markdown(Table("", ("a", "b"), [("x", " ".join(["word"] * 20))])))
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| x", "| …", "| …"]
    assert max(map(len, lines)) <= 56
    assert sum(line.count("word") for line in lines) == 20


def test_a_long_text_is_cut_on_a_page_and_keeps_its_lines() -> None:
    assert "x" * 400 + " …" in to_html(Table("", ("a",), [("x" * 500,)]))
    assert '<span class="text">one\ntwo</span>' in to_html(Table("", ("a",), [("one\ntwo",)]))
    assert len(to_html(Text("x" * 9_000))) < 2_100


def test_the_same_document_in_two_cells_of_a_notebook_shares_no_identifier() -> None:
    document = Document("Title", [Section("Heading", [], "one"), Section("Heading", [], "two")])
    tags = Page(document.to_fragment() + document.to_fragment()).tags
    identifiers = [values["id"] for _, values in tags if "id" in values]
    assert len(identifiers) == len(set(identifiers)) == 8
    labels = {values["aria-labelledby"] for _, values in tags if "aria-labelledby" in values}
    assert labels <= set(identifiers)
    assert "html" not in {tag for tag, _ in tags}
