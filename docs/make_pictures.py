"""Write docs/images/gate.svg: two runs of the demo, one broken on purpose. `make pictures`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from nested_core.text.svg_chart import CURVE_COLOURS, STANDALONE, Chart, Curve, Point, draw_chart

IMAGES = Path(__file__).with_name("images")
RUNS = {"nested-tune demo": (), "nested-tune demo --break-training": ("--break-training",)}
CURVES = {"training loss": "loss", "validation loss": "val_loss"}
PANEL_WIDTH, PANEL_HEIGHT, TITLE_HEIGHT = 560, 300, 34
# An <img> follows the reader's colour scheme, light or dark, by this.
STYLE = """\
svg{--label:#57606a;--line:#d5d9de;--back:#ffffff;--words:#1f2328}
@media (prefers-color-scheme:dark){
svg{--label:#9198a1;--line:#3d444d;--back:#0d1117;--words:#f0f6fc}}
"""
PANEL = replace(
    STANDALONE,
    width=PANEL_WIDTH,
    height=PANEL_HEIGHT,
    label="var(--label)",
    grid="var(--line)",
    background="var(--back)",
    curves=("#b8500b", "#3b7de0", *CURVE_COLOURS),
)


def run_demo(folder: Path, *flags: str) -> Path:
    """The run directory of a demo in `folder`; the broken one ends with exit code 4."""
    command = [sys.executable, "-m", "flows.cli", "demo", "--out", str(folder), *flags]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != (4 if flags else 0):
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    (run,) = (folder / "runs").iterdir()
    return run


def draw_run(run: Path) -> tuple[str, str]:
    """The curves of a run, and its verdict in two words."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curves = [
        Curve(name, [Point(line["step"], line[key]) for line in lines if key in line], True)
        for name, key in CURVES.items()
    ]
    verdict: dict[str, Any] = json.loads((run / "gate.json").read_bytes())
    if verdict["verdict"] == "passed":
        words = f"passed, {verdict['validation']['conclusion']}"
    else:
        words = f"rejected: {verdict['reasons'][0]['code']}"
    return draw_chart(Chart("Losses", "step", "nats/token", curves), PANEL), words


def draw_gate() -> str:
    """Both runs side by side, each under its command and its verdict."""
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (command, flags) in enumerate(RUNS.items()):
            chart, words = draw_run(run_demo(Path(folder) / str(number), *flags))
            x = number * PANEL_WIDTH
            colour = "#2f8f4e" if words.startswith("passed") else "#d1383d"
            panel = chart.replace(
                "<svg ", f'<svg x="{x}" y="{TITLE_HEIGHT}" width="{PANEL_WIDTH}" ', 1
            )
            title = f'<tspan font-family="monospace">{command}</tspan>'
            title += f' <tspan fill="{colour}" font-weight="bold">{words}</tspan>'
            parts.append(f'<text x="{x + 16}" y="22" fill="var(--words)">{title}</text>')
            parts.append(panel.replace("<svg ", f'<svg height="{PANEL_HEIGHT}" ', 1))
    width, height = PANEL_WIDTH * len(RUNS), PANEL_HEIGHT + TITLE_HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="13" '
        f'font-family="sans-serif" role="img" aria-label="Losses of two runs of the demo and their '
        f'verdicts"><style>{STYLE}</style><rect width="100%" height="100%" fill="var(--back)"/>'
        f"{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    (IMAGES / "gate.svg").write_text(draw_gate(), encoding="utf-8")
