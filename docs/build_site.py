"""Build the documents as a site in build/docs/site: `make docs`; `make check` does it as a check.

A broken link, a broken anchor, a page that the navigation lacks, or anything that a page would load
from another host fails it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = Path("build") / "docs"
DOCUMENTS = (
    *("*.md", "docs/*.md", "docs/images/*", "deployments/*.md"),
    *("benchmarks/*.md", "benchmarks/preferences/*.md", "benchmarks/silent_failures/*.md"),
    *("benchmarks/learning/*.md", "benchmarks/learning/*.svg"),
    "benchmarks/learning/rows.jsonl",
    "benchmarks/learning/streams.jsonl",
)
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LOADING = {"src", "srcset", "data", "poster"}  # attributes of any element that fetch by themselves


class _OtherHosts(HTMLParser):
    """Addresses of other hosts that a page loads; a link that a reader follows is none."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element loads."""
        for name, value in attrs:
            loads = name in LOADING or (tag == "link" and name == "href")
            if loads and value and value.startswith(("http:", "https:", "//")):
                self.addresses.append(value)


def build_site(root: Path = ROOT) -> list[str]:
    """Build root/build/docs/site from root's documents; return every problem, if any.

    The site's sources are a copy, because zensical takes one folder and the documents lie in
    several; there they have the same paths, so that their links hold in both.
    """
    build = root / BUILD
    shutil.rmtree(build, ignore_errors=True)
    for pattern in DOCUMENTS:
        for path in root.glob(pattern):
            target = build / "pages" / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    shutil.copytree(root / "docs" / "theme", build / "theme")
    shutil.copyfile(root / "docs" / "zensical.toml", build / "zensical.toml")
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=build,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:  # its own traceback after the list of issues says nothing more
        return [COLOUR.sub("", done.stdout + done.stderr).partition("Traceback")[0]]
    return [*_differences_of_navigation(build), *_loads_of_other_hosts(build / "site")]


def _differences_of_navigation(build: Path) -> Iterator[str]:
    site = tomllib.loads((build / "zensical.toml").read_text(encoding="utf-8"))["project"]
    listed = {page for room in site["nav"] for pages in room.values() for page in pages}
    pages = {page.relative_to(build / "pages").as_posix() for page in build.rglob("pages/**/*.md")}
    for page in sorted(pages - listed):
        yield f"{page} is not in the navigation of docs/zensical.toml"
    for page in sorted(listed - pages):
        yield f"docs/zensical.toml names {page}, which is not there"


def _loads_of_other_hosts(site: Path) -> Iterator[str]:
    for page in sorted(site.rglob("*.html")):
        parser = _OtherHosts()
        parser.feed(page.read_text(encoding="utf-8"))
        for address in parser.addresses:
            yield f"{page.relative_to(site)} loads {address} from another host"


if __name__ == "__main__":
    sys.exit("\n".join(build_site()) or None)
