"""An adapter's page: its champion, what that was made of, and the champions before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Self

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactSort

from nested_core.errors import NestedTuneError
from nested_core.registry import history, read_champion
from nested_core.registry.gate_file import GATE_NAME, MAX_GATE_BYTES
from nested_core.registry.serving_status import describe_server, read_servers
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.storage.strict_files import read_json
from nested_core.text.digest_format import shorten_digest
from nested_core.text.foreign_text import escape_markdown
from tasks.artifact_client import ArtifactClient, artifact_key
from tasks.lineage import (
    LineageNode,
    champion_asset,
    draw_lineage,
    emit_materialization,
    run_asset,
)
from tasks.markdown_page import MarkdownPage
from tasks.verdict_text import describe_losses, describe_suite

MAX_SHOWN_CHANGES = 15
ACTION_VERBS = {
    "promote": "promoted",
    "rollback": "rolled back to",
    "moved": "link moved by hand to",
}


def publish_champion(registry: Path, name: str) -> None:
    """Publish the page of the champion that stands now, and its lineage as an event.

    The champion has moved by then: a file that cannot be read is only logged.
    """
    try:
        version = read_champion(registry, name)
        if version is None:
            return
        champion = _Champion.read(registry, name, version)
        with ArtifactClient() as artifacts:
            artifacts.publish_page(
                artifact_key(name, "champion"),
                describe_champion(registry, name, version),
                f"{shorten_digest(version)}: {champion.describe_loss()}. The champion now",
            )
        emit_materialization(
            champion_asset(name),
            [run_asset(name, champion.run_folder_name)],
            name,
            {
                "version": version,
                "dataset": champion.dataset_digest,
                "parent": champion.parent_version,
            },
        )
    except (NestedTuneError, OSError) as error:
        get_run_logger().warning("The page of %s's champion is not up to date: %s", name, error)


def publish_champion_if_changed(registry: Path, name: str) -> bool:
    """Publish the page where the one on the server is of another champion or of other servers.

    Returns whether the server had a page, and of another champion.
    """
    version = read_champion(registry, name)
    if version is None:
        return False
    page = _read_newest_page(name)
    is_other = page is not None and not str(page.description).startswith(shorten_digest(version))
    champion = _Champion.read(registry, name, version)
    serving = [escape_markdown(text) for _, text in _list_servers(registry, name, champion)]
    if page is None or is_other or not all(text in str(page.data) for text in serving):
        publish_champion(registry, name)
    return is_other


def had_champion(registry: Path, name: str) -> bool:
    """Whether the server has a page of a champion of this name, in this registry."""
    page = _read_newest_page(name)
    return page is not None and escape_markdown(_describe_place(registry, name)) in str(page.data)


def _describe_place(registry: Path, name: str) -> str:
    return str(registry.resolve() / name)


def _read_newest_page(name: str) -> Artifact | None:
    """The newest page of a name's champion; None without one."""
    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[artifact_key(name, "champion")]))
        newest = client.read_artifacts(
            artifact_filter=wanted, sort=ArtifactSort.UPDATED_DESC, limit=1
        )
    return newest[0] if newest else None


def describe_champion(registry: Path, name: str, version: str) -> MarkdownPage:
    """The champion in four lines, the picture of what it was made of, and those before it."""
    champion = _Champion.read(registry, name, version)
    page = MarkdownPage(f"{name}: champion {shorten_digest(version)}")
    page.add_facts(
        [
            ("Loss when it was judged", champion.describe_loss()),
            ("Answers", champion.describe_answers()),
            *_list_servers(registry, name, champion),
            ("Registered (UTC)", _describe_time(champion.provenance.get("registered_at"))),
            ("Run folder", str(champion.provenance.get("run_dir"))),
            ("Registry", _describe_place(registry, name)),
        ]
    )
    page.add_heading("What it was made of")
    page.add_picture(
        champion.draw_lineage_picture(), "data set, base model and parent, run, champion"
    )
    page.add_heading("Champions so far")
    columns = ("when (UTC)", "what", "version", "loss when registered", "by")
    page.add_table(columns, _list_changes(registry, name))
    return page


@dataclass(frozen=True)
class _Champion:
    """A version with the record of how it was made, and with its verdict."""

    name: str
    version: str
    provenance: Mapping[str, Any]
    verdict: Mapping[str, Any]

    @classmethod
    def read(cls, registry: Path, name: str, version: str) -> Self:
        folder = version_folder(registry, name, version)
        verdict = read_json(folder / GATE_NAME, MAX_GATE_BYTES)
        return cls(name, version, read_provenance(folder), verdict)

    @property
    def served_at(self) -> tuple[str, ...]:
        """The addresses of `serve.urls`, as recorded with the version."""
        config = self.provenance.get("config") or {}
        return tuple((config.get("serve") or {}).get("urls") or ())

    @property
    def run_folder_name(self) -> str:
        """The name of the run's folder."""
        return PurePath(str(self.provenance.get("run_dir"))).name

    @property
    def dataset_digest(self) -> str | None:
        """The digest of the data set that it was trained on."""
        return self.provenance.get("dataset_digest")

    @property
    def parent_version(self) -> str | None:
        """The version that it was trained from, or that was champion before it."""
        return self.provenance.get("parent")

    def describe_loss(self) -> str:
        """Its loss before and after training, with the examples."""
        if not self.verdict.get("validation"):
            return "no loss was measured"
        return f"loss {describe_losses(self.verdict)}"

    def describe_answers(self) -> str:
        """The right answers before and after, of each suite."""
        suites = "; ".join(map(describe_suite, self.verdict.get("tasks") or []))
        return suites or "no suite of questions (gate.tasks) was asked"

    def draw_lineage_picture(self) -> str:
        """The picture of what it was made of."""
        config = self.provenance.get("config") or {}
        parent = (
            "a fresh adapter"
            if self.parent_version is None
            else shorten_digest(self.parent_version)
        )
        data = (str(config.get("data")), shorten_digest(self.dataset_digest or "unknown"))
        step = f"step {self.verdict.get('adapter_step')}"
        sources = [
            LineageNode("data set", data),
            LineageNode("base model", (str(config.get("model")),)),
            LineageNode("parent", (parent,)),
        ]
        return draw_lineage(
            sources,
            LineageNode("run", (self.run_folder_name, step)),
            LineageNode("champion", (self.name, shorten_digest(self.version))),
        )


def _list_servers(registry: Path, name: str, champion: _Champion) -> list[tuple[str, str]]:
    """A fact for each server of the name: since when it serves the champion, or why it does not."""
    servers = read_servers(registry, name, champion.served_at)
    return [("Server", describe_server(server, champion.version)) for server in servers]


def _list_changes(registry: Path, name: str) -> list[tuple[object, ...]]:
    """The last changes of the champion as rows, the latest first."""
    moves = [line for line in history(registry, name) if line["action"] in ACTION_VERBS]
    return [
        (
            _describe_time(line["time"]),
            ACTION_VERBS[line["action"]],
            shorten_digest(line["version"] or "none"),
            _read_registered_loss(registry, name, line["version"]),
            f"{line['by']}: {line['reason']}" if line.get("reason") else line["by"],
        )
        for line in moves[: -MAX_SHOWN_CHANGES - 1 : -1]
    ]


def _read_registered_loss(registry: Path, name: str, version: str | None) -> float | None:
    """The loss that a version was registered with; None once it is collected."""
    if version is None:
        return None
    path = version_folder(registry, name, version) / GATE_NAME
    if not path.exists():
        return None
    loss = (read_json(path, MAX_GATE_BYTES).get("validation") or {}).get("loss_after")
    return None if loss is None else float(loss)


def _describe_time(time: object) -> str:
    """`2026-11-21T16:19:28.123456+00:00` to the minute, in the words of the history."""
    return str(time)[:16].replace("T", " ")
