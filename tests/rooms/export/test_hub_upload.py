"""export --push: what reaches the hub, which is a local server here with the calls of its API."""

from __future__ import annotations

import base64
import importlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import ModelCardData

from nested_core.errors import ConfigError, GateRejected
from nested_core.rooms.export.hub_upload import Upload, prepare_upload, upload
from tests.example import DATA
from tests.flows.conftest import CommandRun, Ended
from tests.gate_files import judged_files, read_gate, write_gate

Run = Callable[..., Ended]


class Hub:
    """What the hub holds: files and visibility of a repository, and the tokens that it saw."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.files: dict[str, bytes] = {}
        self.private: bool | None = None
        self.tokens: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.refusal: int | None = None

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """The status and document for a call, as the hub's API gives them."""
        if self.refusal is not None:
            return self.refusal, {"error": "no"}
        if path == "/api/repos/create":
            url = {"url": f"{self.address}/ann/geo"}
            if self.private is not None:
                return 409, url
            self.private = json.loads(body)["visibility"] == "private"
            return 200, url
        if path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith("safetensors") else "regular" for name in files}
            return 200, {
                "files": [
                    {"path": name, "uploadMode": mode, "shouldIgnore": False}
                    for name, mode in modes.items()
                ]
            }
        if path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{self.address}/lfs/{entry['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        if path.startswith("/lfs/"):
            self.objects[path.removeprefix("/lfs/")] = body
            return 200, {}
        if path.endswith("/commit/main"):
            self._commit(body)
            commit = {"commitUrl": f"{self.address}/ann/geo/commit/1", "commitOid": "1" * 40}
            return 200, commit
        if path == "/api/models/ann/geo":
            return 200, {"id": "ann/geo", "private": self.private, "tags": [], "downloads": 0}
        return 200, {"errors": [], "warnings": []}  # /api/validate-yaml

    def _commit(self, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, which the library takes for the real one."""

    class Handler(BaseHTTPRequestHandler):
        """Hands each call to the hub."""

        def do_GET(self) -> None:
            served.tokens.add(self.headers.get("Authorization", ""))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self._read_chunks()
            status, document = served.answer(self.path, body)
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_GET

        def _read_chunks(self) -> bytes:
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def log_message(self, *args: object) -> None:
            """Nothing on standard error."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", served.address)
    monkeypatch.setenv("HF_TOKEN", "hf_of_ann")
    yield served
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the library, in itself
def test_a_run_is_uploaded_with_a_card_and_without_rows_or_places(command_run, hub) -> None:
    prepared = prepare_upload(command_run.run_dir, "ann/geo")
    assert hub.files == {}
    done = upload(prepared)
    assert done.url == f"{hub.address}/ann/geo"
    assert hub.private is True
    assert hub.tokens == {"Bearer hf_of_ann"} | (hub.tokens & {""})
    assert hub.files == dict(prepared.files)
    assert sorted(hub.files) == ["README.md", "adapter_config.json", "adapters.safetensors"]
    weights = (command_run.run_dir / "adapter" / "adapters.safetensors").read_bytes()
    assert hub.files["adapters.safetensors"] == weights
    config = json.loads(hub.files["adapter_config.json"])
    assert "/" not in config["model"]
    shown = hub.files["README.md"] + hub.files["adapter_config.json"]
    for place in (command_run.run_dir, Path.cwd(), Path.home()):
        assert str(place).encode() not in shown
    for row in map(json.loads, (DATA / "train.jsonl").read_text().splitlines()):
        assert all(message["content"].encode() not in shown for message in row["messages"])
    assert b"hf_of_ann" not in shown


def test_the_hub_reads_the_fields_of_the_card(command_run: CommandRun) -> None:
    card = prepare_upload(command_run.run_dir, "ann/geo").card
    data = ModelCard(card).data
    assert isinstance(data, ModelCardData)
    assert data.library_name == "mlx"
    assert "Verified: " in card
    assert ", registered" not in card


def test_what_did_not_pass_and_what_nobody_judged_is_not_uploaded(command_run, tmp_path) -> None:
    run = shutil.copytree(command_run.run_dir, tmp_path / "run")
    gate = read_gate(run / "gate.json")
    gate |= {
        "verdict": "failed",
        "reasons": [{"code": "loss_regressed", "message": "the loss rose"}],
    }
    write_gate(run, gate, judged_files(run))
    with pytest.raises(GateRejected):
        prepare_upload(run, "ann/geo")
    with pytest.raises(ConfigError, match="has no verdict of the gate"):
        prepare_upload(run / "adapter", "ann/geo")


def test_a_public_repository_is_not_written_without_saying_so(hub: Hub) -> None:
    hub.private = False
    prepared = Upload("ann/geo", {"README.md": b"card"})
    with pytest.raises(ConfigError, match="ann/geo is public, and nothing was uploaded"):
        upload(prepared)
    assert hub.files == {}
    upload(prepared, public=True)
    assert hub.files == {"README.md": b"card"}


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_refuses_is_said_with_what_to_do(hub: Hub, status: int) -> None:
    hub.refusal = status
    with pytest.raises(
        ConfigError, match=r"could not be uploaded: .*`hf auth login` stores"
    ) as end:
        upload(Upload("ann/geo", {"README.md": b"card"}))
    assert "hf_of_ann" not in str(end.value)


def test_the_command_shows_what_would_be_sent(command_run: CommandRun, nested_tune: Run) -> None:
    done = nested_tune("export", command_run.run_dir, "--push", "ann/geo", "--dry-run")
    assert done.code == 0
    assert done.stdout.startswith("---\n")
    assert done.stdout.endswith("Nothing was sent to ann/geo.\n")
    assert "adapters.safetensors: " in done.stderr


@pytest.mark.parametrize("name", ["geo", "ann/", "../up", "ann/geo/more", "ann/ge o"])
def test_a_name_that_the_hub_cannot_have_is_refused(command_run, nested_tune, name) -> None:
    done = nested_tune("export", command_run.run_dir, "--push", name)
    assert done.code == 2
    assert "expected USER/NAME" in done.message()


def test_flags_of_push_are_not_taken_elsewhere(command_run: CommandRun, nested_tune: Run) -> None:
    done = nested_tune("export", command_run.run_dir, "--peft", "out", "--dry-run")
    assert done.code == 2
    assert "belong to --push USER/NAME" in done.message()
