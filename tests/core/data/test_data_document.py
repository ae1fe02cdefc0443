"""docs/data.md names every check that there is, and none that there is not."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
DATA = ROOT / "nested_core" / "data"
# Where a check gets its name: a rule's, a problem's, or what a function of names returns.
NAMED = re.compile(
    r'(?:LineProblem\(|return |else |return b"", \(|= \()"([a-z0-9]+(?:-[a-z0-9]+)+)"'
)
RULES = re.compile(r'name="([a-z-]+)"')


def test_every_check_is_documented() -> None:
    sources = {str(path): path.read_text(encoding="utf-8") for path in DATA.rglob("*.py")}
    code = "".join(sources.values())
    rules = "".join(text for name, text in sources.items() if name.endswith("rules.py"))
    lines = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").splitlines()
    cells = [line.split("|")[1] for line in lines if re.match(r"\| `[a-z]", line)]
    documented = {name for cell in cells for name in re.findall(r"`([a-z0-9-]+)`", cell)}
    assert len(documented) > 40
    infos = {name for name in documented if name.startswith("dropped-")}  # by reason
    assert {name.removeprefix("dropped-") for name in infos} == {"duplicate", "leakage", "overlong"}
    assert {name for name in documented - infos if f'"{name}"' not in code} == set()
    assert {*NAMED.findall(code), *RULES.findall(rules)} - documented == set()
