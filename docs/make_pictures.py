"""Write the drawings in docs/images: `make pictures`.

Curves, verdicts and tables are those of two runs of the demo that it makes, one broken on purpose.
An image follows the reader's colour scheme.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nested_core.records.paired_difference import student_t_quantile
from nested_core.records.run_status import read_run
from nested_core.report.run_report import describe_run
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.document import Cell, Section, Table, Text
from nested_core.text.html_markup import Html, escaped_html
from nested_core.text.svg_chart import STANDALONE, Chart, Curve, Point, draw_chart

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"

# An <img> follows the reader's colour scheme, light or dark, by this.
STYLE = """\
svg{--label:#57606a;--line:#d5d9de;--back:#ffffff;--words:#1f2328;--panel:#f3f5f8;--good:#1a7f37;\
--bad:#c22b2b;--ours:#3b7de0;--theirs:#9aa4af;--first:#2f6fd0;--second:#b8500b;--third:#2f8f4e}
@media (prefers-color-scheme:dark){
svg{--label:#9198a1;--line:#3d444d;--back:#0d1117;--words:#f0f6fc;--panel:#1b222b;--good:#3fb950;\
--bad:#f47067;--ours:#5b9bff;--theirs:#6b7680;--first:#6ea8ff;--second:#ffa564;--third:#66d394}}
"""
WIDTH = 560  # legible at a phone's width
LINE = 18
PANEL_HEIGHT, TITLE_HEIGHT = 300, 34
COLOURS = ("first", "second", "third")
PANEL = replace(
    STANDALONE,
    width=WIDTH,
    height=PANEL_HEIGHT,
    label="var(--label)",
    grid="var(--line)",
    background="var(--back)",
    curves=[f"var(--{colour})" for colour in COLOURS],
)

RUNS = {"nested-tune demo": (), "nested-tune demo --break-training": ("--break-training",)}
CURVES = {"training loss": "loss", "validation loss": "val_loss"}
SPREADS = (0.2, 0.1, 0.05)
EXAMPLES = range(5, 201)
# Of docs/controls.md: what two adapters make of their own and of another row's prompt
PROMPTS = ("after its own prompt", "after another row's")
LOSSES_OF_PROMPTS = {
    "a sound table": (0.0346, 1.074),
    "the same table, its answers moved by one row": (0.466, 0.465),
}
# What each step of a run writes, and what is checked there; the letters are those of the page.
STEPS = (
    ("1 BEGIN", "config.yaml", ("keys, types and paths",)),
    ("2 VALIDATE", "dataset.json", ("each line, digest (a)",)),
    ("3 LOAD", "initial/  tiers.json", ("fingerprint of the base model (b)",)),
    (
        "4 TRAIN",
        "checkpoints/  adapter/  metrics.jsonl",
        ("updates read back by name (c)", "checkpoints hashed, renamed (d)"),
    ),
    (
        "5 GATE",
        "gate.json  gate-losses.jsonl  MANIFEST.json",
        ("both adapters compared (e)", "a new process loads the adapter (f)"),
    ),
    ("6 REGISTER", "versions/<digest>/", ("hashed again (g)",)),
    ("7 PROMOTE", "history.jsonl  champion", ("hash chain, the link moves last (h)",)),
)


@dataclass
class Drawing:
    """An SVG that is drawn from its upper left corner; `title` is what it shows, in words."""

    title: str
    height: int
    width: int = WIDTH
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, colour: str = "words", **style: str) -> None:
        """A line of text; `style` has attributes of SVG, with _ for -."""
        attributes = "".join(f' {name.replace("_", "-")}="{v}"' for name, v in style.items())
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="var(--{colour})"{attributes}>'
            f"{escaped_html(words)}</text>"
        )

    def box(
        self, x: float, y: float, width: float, height: float, lines: Sequence[str] = ()
    ) -> None:
        """A panel; the first line in it is bold."""
        self.bar(x, y, width, height, "panel", rx="6", stroke="var(--line)")
        for number, line in enumerate(lines):
            style = {"font_weight": "bold"} if number == 0 else {"font_size": "12"}
            colour = "label" if number else "words"
            self.text(x + 12, y + 22 + number * LINE, line, colour, **style)

    def bar(
        self, x: float, y: float, width: float, height: float, colour: str, **style: str
    ) -> None:
        """A rectangle of one colour."""
        attributes = "".join(f' {name.replace("_", "-")}="{v}"' for name, v in style.items())
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'fill="var(--{colour})"{attributes}/>'
        )

    def arrow(self, *places: tuple[float, float], colour: str = "label") -> None:
        """An arrow through places."""
        path = "L".join(f"{x:g} {y:g}" for x, y in places)
        (x0, y0), (x, y) = places[-2:]
        across, down = (x > x0) - (x < x0), (y > y0) - (y < y0)
        tip = f"M{x:g} {y:g}l{-7 * across - 4 * down:g} {-7 * down - 4 * across:g}"
        tip += f"l{8 * down:g} {8 * across:g}z"
        self.parts.append(
            f'<path d="M{path}" fill="none" stroke="var(--{colour})" stroke-width="1.5"/>'
            f'<path d="{tip}" fill="var(--{colour})"/>'
        )

    def panel(self, chart: str, x: float, y: float) -> None:
        """A chart of PANEL's size."""
        place = f'<svg x="{x:g}" y="{y:g}" width="{WIDTH}" height="{PANEL_HEIGHT}" '
        self.parts.append(chart.replace("<svg ", place, 1))

    def write(self, name: str) -> None:
        """Write it to docs/images."""
        (IMAGES / name).write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" font-size="13" font-family="sans-serif" role="img" '
            f'aria-label="{escaped_html(self.title)}"><style>{STYLE}</style>'
            f'<rect width="100%" height="100%" fill="var(--back)"/>{"".join(self.parts)}</svg>\n',
            encoding="utf-8",
        )


def run_demo(folder: Path, *flags: str) -> Path:
    """The run directory of a demo in `folder`; the broken one ends with exit code 4."""
    command = [sys.executable, "-m", "flows.cli", "demo", "--out", str(folder), *flags]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != (4 if flags else 0):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    (run,) = (folder / "runs").iterdir()
    return run


def draw_gate(runs: dict[str, Path], *, beside: bool) -> Drawing:
    """Both runs, each under its command and its verdict, beside or below each other."""
    height = PANEL_HEIGHT + TITLE_HEIGHT
    title = "Losses of two runs of the demo and their verdicts"
    drawing = Drawing(title, height if beside else 2 * height, 2 * WIDTH if beside else WIDTH)
    for number, (command, run) in enumerate(runs.items()):
        x, y = (number * WIDTH, 0) if beside else (0, number * height)
        words = _verdict_in_words(run)
        drawing.text(x + 16, y + 22, command, font_family="monospace")
        colour = "good" if words.startswith("passed") else "bad"
        end = {"text_anchor": "end", "font_weight": "bold"}
        drawing.text(x + WIDTH - 20, y + 22, words, colour, **end)
        drawing.panel(_draw_losses(run), x, y + TITLE_HEIGHT)
    return drawing


def _draw_losses(run: Path) -> str:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curves = [
        Curve(name, [Point(line["step"], line[key]) for line in lines if key in line], True)
        for name, key in CURVES.items()
    ]
    return draw_chart(Chart("Losses", "step", "nats/token", curves), PANEL)


def _verdict_in_words(run: Path) -> str:
    verdict: dict[str, Any] = json.loads((run / "gate.json").read_bytes())
    if verdict["verdict"] == "passed":
        return f"passed, {verdict['validation']['conclusion']}"
    return f"rejected: {verdict['reasons'][0]['code']}"


def draw_report(run_dir: Path) -> Drawing:
    """The top of report.html: the verdict, its checks, and answers."""
    document = describe_run(read_run(RunDirectory(run_dir)))
    verdict, answers, checks = [block for block in document.blocks if isinstance(block, Section)][
        :3
    ]
    (headline,) = [b for b in verdict.blocks if isinstance(b, Text) and b.is_headline]
    asked = next(table for table in _tables_of(answers) if "candidate" in table.columns)
    drawing = Drawing(f"The page of a run: {headline.text}", 0)
    drawing.text(16, 28, document.title, font_weight="bold")
    drawing.text(16, 58, headline.text, "good", font_size="18", font_weight="bold")
    drawing.text(16, 90, answers.heading, font_weight="bold")
    few = replace(asked, rows=asked.rows[:4])
    y = _draw_table(drawing, 120, few, {"candidate": 16, "base": 376})
    drawing.text(16, y + 24, checks.heading, font_weight="bold")
    columns = {"checked": 16, "before": 262, "after": 336, "verdict": 470}
    drawing.height = _draw_table(drawing, y + 54, next(_tables_of(checks)), columns)
    return drawing


def _tables_of(section: Section) -> Iterator[Table]:
    for block in section.blocks:
        if isinstance(block, Table):
            yield block
        elif isinstance(block, Section):
            yield from _tables_of(block)


def _draw_table(drawing: Drawing, y: int, table: Table, places: dict[str, int]) -> int:
    """Some columns of a table, each at its place; returns where it ends."""
    columns = [(table.columns.index(name), name, x) for name, x in places.items()]
    for _, name, x in columns:
        drawing.text(x, y, name, "label", font_size="12")
    for row in table.rows:
        drawing.bar(16, y + 8, WIDTH - 32, 1, "line")
        y += 24
        for number, _, x in columns:
            value = row[number]
            cell = value if isinstance(value, Cell) else Cell(value)
            mark = f'<tspan fill="var(--{cell.tone})">{cell.mark}</tspan> ' if cell.mark else ""
            words = escaped_html(cell.value)
            drawing.text(x, y, Html(f"{mark}{words}"), font_size="12")
    return y + 20


def draw_pipeline() -> Drawing:
    """The seven steps of a run, what each writes, and what is checked."""
    drawing = Drawing("The steps of a run, the files that each writes, and what is checked", 0)
    inputs = ("lora.yaml, flags", "data set", "base model")
    for number, words in enumerate(inputs):
        drawing.box(16 + number * 180, 12, 168, 34, [words])
        drawing.arrow((100 + number * 180, 46), (100 + number * 180, 68))
    y = 68
    for title, files, checks in STEPS:
        height = 34 + LINE * len(checks)
        if title.startswith("6"):
            drawing.arrow((100, y - 16), (100, y + 26), colour="good")
            drawing.text(112, y + 8, "passed", "good", font_weight="bold")
            drawing.arrow((352, y - 16), (352, y + 26), colour="bad")
            drawing.text(364, y + 8, "failed: exit code 4", "bad", font_weight="bold")
            drawing.text(352, y + 44, "nothing is registered,", "label", font_size="12")
            drawing.text(352, y + 62, "report.html has the reasons", "label", font_size="12")
            y += 26
        elif not title.startswith("1"):
            drawing.arrow((100, y - 16), (100, y))
        width = 314 if title[0] in "67" else WIDTH - 32
        drawing.box(16, y, width, height, [title, *checks])
        style = {"font_family": "monospace", "font_size": "12", "text_anchor": "end"}
        drawing.text(width + 4, y + 22, files, **style)
        y += height + 16
    drawing.height = y
    return drawing


def draw_power() -> Drawing:
    """The smallest gain that is found in 80 of 100 test sets, by the number of examples."""
    title = "Smallest gain that is detected with 80 % power, nats/token"
    curves = [Curve(f"{spread:g}", _detectable(spread)) for spread in SPREADS]
    chart = Chart(title, "held-out examples", "nats/token", curves, from_zero=True)
    drawing = Drawing(title, PANEL_HEIGHT + 2 * TITLE_HEIGHT - 14)
    drawing.text(16, 22, title, font_weight="bold")
    drawing.text(16, 46, "Standard deviation of the differences:", "label")
    for number, curve in enumerate(curves):
        x = 270 + number * 80
        drawing.bar(x, 40, 18, 3, COLOURS[number])
        drawing.text(x + 24, 46, curve.name, "label")
    drawing.panel(draw_chart(chart, replace(PANEL, has_legend=False)), 0, 2 * TITLE_HEIGHT - 14)
    return drawing


def _detectable(spread: float) -> list[Point]:
    """(t at 97.5 % + t at 80 %) standard errors, in nats/token."""
    return [
        Point(
            n, spread / n**0.5 * (student_t_quantile(0.975, n - 1) + student_t_quantile(0.8, n - 1))
        )
        for n in EXAMPLES
    ]


def draw_prompts() -> Drawing:
    """Losses of held-out answers after their own prompt and after another row's."""
    title = "Loss of held-out answers, nats/token"
    drawing = Drawing(title, 206)
    drawing.text(16, 22, title, font_weight="bold")
    for number, prompt in enumerate(PROMPTS):
        drawing.bar(16 + number * 170, 38, 18, 10, COLOURS[number])
        drawing.text(40 + number * 170, 48, prompt, "label")
    for group, (table, losses) in enumerate(LOSSES_OF_PROMPTS.items()):
        y = 78 + group * 68
        drawing.text(16, y, table)
        for number, loss in enumerate(losses):
            top, width = y + 8 + number * 20, round(400 * loss)
            drawing.bar(16, top, width, 14, COLOURS[number])
            drawing.text(24 + width, top + 12, f"{loss:.3g}", "label")
    return drawing


def draw_topology() -> Drawing:
    """What runs on a server, and who talks to whom."""
    drawing = Drawing(
        "Prefect's server starts runs on two workers; they write the registry, which serve reads",
        424,
    )
    drawing.box(16, 16, 150, 58, ["You", "browser, CLI, alerts"])
    drawing.box(206, 16, 180, 58, ["Prefect's server", "schedules, states, pages"])
    drawing.box(426, 16, 118, 58, ["PostgreSQL", "its database"])
    drawing.arrow((166, 45), (206, 45))
    drawing.arrow((386, 45), (426, 45))
    drawing.box(
        16, 126, 252, 76, ["worker mlx-gpu", "trains and runs the gate,", "one run at a time"]
    )
    drawing.box(
        292, 126, 252, 76, ["worker cpu", "promotes, asks, checks each hour", "up to 8 at a time"]
    )
    for x in (236, 356):
        drawing.arrow((x, 74), (x, 126))
    drawing.text(246, 104, "due runs", "label", font_size="12")
    drawing.box(16, 254, 252, 58, ["runs/", "checkpoints, adapter, verdict"])
    drawing.box(292, 254, 252, 58, ["registry/", "versions, champion, history"])
    drawing.arrow((142, 202), (142, 254))
    drawing.arrow((418, 202), (418, 254))
    drawing.arrow((268, 283), (292, 283))
    drawing.box(292, 350, 252, 58, ["nested-tune serve", "answers with the champion"])
    drawing.arrow((418, 312), (418, 350))
    drawing.box(16, 350, 252, 58, ["Your application", "OpenAI's API"])
    drawing.arrow((268, 379), (292, 379))
    return drawing


BEYOND_ONE_MACHINE = {  # by picture: boxes in their order, and what goes along the arrows
    "mirror": (
        [
            ("Nights", "registry/, the author"),
            ("Bucket", "versions, champion"),
            ("Servers", "copies"),
        ],
        ["puts", "read"],
    ),
    "bucket-data": (
        [("Bucket", "parquet, JSONL"), ("Cache", "by entity tag"), ("Training", "local files")],
        ["fetched once", "verified"],
    ),
    "containers": (
        [
            ("Prefect server", "deployments"),
            ("Worker", "docker, kubernetes"),
            ("Container", "/work"),
        ],
        ["due runs", "starts, stops"],
    ),
}


def draw_row(boxes: list[tuple[str, str]], arrows: list[str]) -> Drawing:
    """Boxes side by side, with words above the arrows between them."""
    drawing = Drawing(", ".join(title for title, _ in boxes), 84)
    for number, words in enumerate(boxes):
        drawing.box(16 + number * 198, 12, 132, 60, list(words))
    for number, words in enumerate(arrows):
        start = 148 + number * 198
        drawing.arrow((start, 42), (start + 66, 42))
        drawing.text(start + 33, 32, words, "label", font_size="10", text_anchor="middle")
    return drawing


def main() -> None:
    """Write every drawing; two demos take some minutes."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            command: run_demo(Path(folder) / str(number), *flags)
            for number, (command, flags) in enumerate(RUNS.items())
        }
        draw_gate(runs, beside=True).write("gate.svg")
        draw_gate(runs, beside=False).write("gate-narrow.svg")
        draw_report(next(iter(runs.values()))).write("report.svg")
    draw_pipeline().write("pipeline.svg")
    draw_power().write("power.svg")
    draw_topology().write("topology.svg")
    draw_prompts().write("prompts.svg")
    for name, (boxes, arrows) in BEYOND_ONE_MACHINE.items():
        draw_row(boxes, arrows).write(f"{name}.svg")


if __name__ == "__main__":
    main()
