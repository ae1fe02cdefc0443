"""Somebody who may start runs with parameters of their own, and nothing else, on a real server.

Every attempt is a run of a deployment, made as SECURITY.md's proxy would let it through: an id and
`parameters`. They share one server and home, and nothing that stood there before may have changed
when all have ended: no file, no champion; nothing outside was read, and no code ran.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.filters import LogFilter
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import State

from nested_core import registry as core
from tests.example import DATA
from tests.production.postgresql import Cluster
from tests.production.stack import NAME, Stack, wait_for

pytestmark = [pytest.mark.production, pytest.mark.timeout(1800)]
SECRET = "the-words-that-nobody-may-read"
LONGEST = 900.0  # seconds until an attempt ends: all wait in one line of a pool of one
MANUAL, PROMOTE = f"finetune/{NAME}-manual", f"promote/{NAME}-approved"
ROLLBACK = f"rollback/{NAME}-rollback"
RECONCILE = f"reconcile/{NAME}-hourly"
SUITE = {"name": "mine", "score": "contains"}


@dataclass(frozen=True)
class Place:
    """The stack, and what an attacker would like to reach."""

    stack: Stack
    champion: str
    waiting: str  # a version that waits for its approval
    first_run: str  # the folder of the run that the champion came from, in the home
    protected: dict[str, str]  # file -> digest, of all that stood before the first attempt

    @property
    def marker(self) -> Path:
        """What any code that ran would have left."""
        return self.stack.folder / "code-ran"


@dataclass(frozen=True)
class Outcomes:
    """What the attempts came to."""

    said: dict[str, str]  # attempt -> name and message of the state that its run ended in
    read: list[Path]  # the secrets whose time of last access has moved


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, binaries: Path) -> Iterator[Place]:
    """A server and workers with a champion, a policy that asks a person, and things to steal."""
    stack = Stack(tmp_path_factory.mktemp("attacked"), Cluster(binaries))
    try:
        stack.start()
        person = stack.folder / "person"
        for pool in ("mlx-gpu", "cpu"):
            stack.start_worker(pool, HOME=str(person))
        _write_secrets(stack)
        _write_hostile_models(stack)
        ended = stack.wait(stack.submit(MANUAL))
        assert ended.state is not None
        assert ended.state.name == "Promoted", ended.state.message
        champion = core.read_champion(stack.registry, NAME)
        assert champion is not None
        done = stack.nested_tune("policy", NAME, "--promote", "approve", "--registry", "registry")
        assert done.returncode == 0, done.stderr
        (first_run,) = (stack.home / "runs").iterdir()
        stack.wait(stack.submit(MANUAL, seed=1))
        (waiting,) = set(core.list_versions(stack.registry, NAME)) - {champion}
        protected = digests(stack.folder, first_run)
        relative = str(first_run.relative_to(stack.home))
        yield Place(stack, champion, waiting, relative, protected)
    finally:
        stack.stop()


def _write_secrets(stack: Stack) -> None:
    """Rows and adapters that a run would gladly take, outside of the roots, and links to them."""
    outside, person = stack.folder / "outside", stack.folder / "person"
    for folder in (outside, person, person / ".ssh"):
        folder.mkdir(exist_ok=True)
    line = (DATA / "train.jsonl").read_text().splitlines()[0].replace("Where", SECRET)
    for file in ("train.jsonl", "valid.jsonl", "secret.jsonl"):
        (outside / file).write_text(f"{line}\n" * 8)
    (outside / "suite.jsonl").write_text(json.dumps({"prompt": SECRET, "expected": "x"}) + "\n")
    (person / "secret.jsonl").write_text(f"{line}\n" * 8)
    (person / ".ssh" / "id").write_text(SECRET)
    (stack.folder / "control").write_text("read to see whether the time of an access is kept")
    (stack.home / "link.jsonl").symlink_to(outside / "secret.jsonl")
    (stack.home / "linked").symlink_to(outside)


def _write_hostile_models(stack: Stack) -> None:
    """Models below the roots whose own code leaves the marker, for mlx_lm and transformers."""
    marker = stack.folder / "code-ran"
    code = f"open({str(marker)!r}, 'w').write('ran')\n"
    base = stack.home / "examples" / "geography-base"
    for name, file, changes in (
        ("model-file", "config.json", {"model_file": "evil.py"}),
        (
            "auto-map",
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"},
        ),
    ):
        folder = stack.home / "examples" / name
        shutil.copytree(base, folder)
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | changes))
        (folder / "evil.py").write_text(code)
    (stack.home / "evil.py").write_text(code + "def score(*_): return 1.0\n")


def digests(*folders: Path) -> dict[str, str]:
    """The digest of each file that no attempt may touch: secrets, models, data, versions, a run."""
    found: dict[str, str] = {}
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and not _is_the_systems_own(file.relative_to(folder)):
                found[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _is_the_systems_own(file: Path) -> bool:
    """What the server, the workers and the runs of the attempts write by right."""
    parts = file.parts
    return (
        parts[0] in ("database", "postgresql", "prefect", "data")
        or file.suffix == ".log"
        or parts[:2] in (("home", "runs"), ("home", ".cache"), ("home", "registry"))
    )


def attempts(place: Place) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is tried: a name -> the deployment and the parameters that differ from its own."""
    outside = str(place.stack.folder / "outside")
    champion_folder = f"registry/{NAME}/versions/{place.champion}"

    def fine_tune(**changes: Any) -> tuple[str, dict[str, Any]]:
        return MANUAL, changes

    def suite(**changes: Any) -> dict[str, Any]:
        return {"gate": {"tasks": [SUITE | changes]}}

    def load(**entry: Any) -> dict[str, Any]:
        columns = {"prompt_feature": "prompt", "completion_feature": "completion"}
        return {"data": "", "hf_dataset": [columns | entry]}

    always = {"path": "registry", "name": NAME, "promote": "always", "require_validation": False}
    loose = {"max_val_loss_increase": 1000.0, "min_relative_change": 0.0, "noise": "none"}
    return {
        "read data outside": fine_tune(data=outside),
        "read data up": fine_tune(data="../outside"),
        "read data of a home": fine_tune(data="~"),
        "read data through a link": fine_tune(data="linked"),
        "read data through /proc": fine_tune(data=f"/proc/self/root{outside}"),
        "read a suite of a home": fine_tune(**suite(file="~/secret.jsonl")),
        "read a suite up": fine_tune(**suite(file="../outside/suite.jsonl")),
        "read a held-out file through a link": fine_tune(gate={"held_out": "link.jsonl"}),
        "read general data hidden": fine_tune(
            gate={"general_data": "~/.ssh/id", "max_general_loss_increase": 1.0}
        ),
        "read an adapter outside": fine_tune(resume_adapter_file=f"{outside}/secret.jsonl"),
        "read hosts outside": fine_tune(training={"hostfile": f"{outside}/secret.jsonl"}),
        "load a folder outside": fine_tune(**load(path=outside)),
        "load files outside": fine_tune(
            **load(path="json", config={"data_files": f"{outside}/secret.jsonl"})
        ),
        "load files by a pattern": fine_tune(
            **load(path="json", config={"data_files": "linked/*.jsonl"})
        ),
        "load by a chain of protocols": fine_tune(
            **load(path="json", config={"data_files": f"zip://x::file://{outside}/secret.jsonl"})
        ),
        "load a pickle": fine_tune(**load(path="pandas", config={"data_files": "evil.pkl"})),
        "write over the champion": fine_tune(adapter_path=f"registry/{NAME}/champion"),
        "write into a version": fine_tune(adapter_path=f"{champion_folder}/../x/../{'0' * 64}"),
        "write into the registry": fine_tune(run_dir=f"registry/{NAME}/runs"),
        "write into another's run": fine_tune(adapter_path=f"{place.first_run}/adapter"),
        "write into the model": fine_tune(adapter_path="examples/geography-base"),
        "write into the data": fine_tune(adapter_path="examples/geography"),
        "write outside": fine_tune(run_dir=f"{outside}/run"),
        "write up": fine_tune(adapter_path="../outside/adapter"),
        "write through a link": fine_tune(run_dir="linked/run"),
        "make a registry in a version": fine_tune(registry=always | {"path": champion_folder}),
        "make a registry outside": fine_tune(registry=always | {"path": f"{outside}/registry"}),
        "make a name that is a path": fine_tune(registry=always | {"name": "../evil"}),
        "run a model's file": fine_tune(model="examples/model-file", trust_remote_code=True),
        "run a model's file unasked": fine_tune(model="examples/model-file"),
        "run a tokenizer": fine_tune(model="examples/auto-map", trust_remote_code=True),
        "run a tokenizer unasked": fine_tune(model="examples/auto-map"),
        "run a scorer": fine_tune(
            gate={
                "allow_python_scorers": True,
                "tasks": [SUITE | {"file": "evil.py", "score": "python", "function": "evil:score"}],
            }
        ),
        "run by an optimizer": fine_tune(optimizer="os.system"),
        "run by a template of the server": fine_tune(
            model={
                "__prefect_kind": "jinja",
                "template": "{{ cycler.__init__.__globals__.os.system('touch "
                + str(place.marker)
                + "') }}",
            }
        ),
        "run by a block": fine_tune(model={"$ref": "00000000-0000-0000-0000-000000000000"}),
        "promote with loose bounds": fine_tune(registry=always, gate=loose, seed=3),
        "promote what never trained": fine_tune(registry=always, gate=loose, learning_rate=1e-12),
        "promote what waits": (PROMOTE, {"version": place.waiting, "requires_approval": False}),
        "promote from outside": (PROMOTE, {"version": place.waiting, "registry": outside}),
        "promote a path": (PROMOTE, {"version": "../" * 20 + "etc"}),
        "roll back to what waits": (ROLLBACK, {"to": place.waiting, "by": "eve"}),
        "roll back outside": (ROLLBACK, {"registry": outside, "by": "eve"}),
        "reconcile outside": (RECONCILE, {"registry": "/etc"}),
        "reconcile a path": (RECONCILE, {"names": ["../../etc"]}),
    }


def start(stack: Stack, deployment: str, changes: dict[str, Any]) -> UUID | None:
    """What the proxy lets through; None where the server itself refuses the parameters."""
    with stack.connected() as client:
        there = client.read_deployment_by_name(deployment)
        config = there.parameters.get("config", {}) | changes
        try:
            run = client.create_flow_run_from_deployment(there.id, parameters={"config": config})
        except PrefectHTTPStatusError as error:
            if error.response.status_code not in (400, 409, 422):
                raise
            return None
    return run.id


def never_read(file: Path) -> None:
    """Set back the time of last access, which a file system moves when the file is read next."""
    os.utime(file, (0, file.stat().st_mtime))


@pytest.fixture(scope="module")
def outcomes(place: Place) -> Outcomes:
    """All attempts, started before the first of them ends."""
    stack = place.stack
    secrets = [*stack.folder.glob("outside/*"), *stack.folder.glob("person/*.jsonl")]
    control = stack.folder / "control"
    for file in (*secrets, control):
        never_read(file)
    started = {name: start(stack, *attempt) for name, attempt in attempts(place).items()}
    said: dict[str, str] = {}
    for name, run_id in started.items():
        state = None if run_id is None else wait_for(partial(_ended, stack, run_id), LONGEST)
        said[name] = "refused by the server" if state is None else f"{state.name}: {state.message}"
    print(*(f"{name}: {what}" for name, what in said.items()), sep="\n")
    read = [file for file in secrets if file.stat().st_atime > 0]
    control.read_text()
    assert control.stat().st_atime > 0, "this file system keeps no time of access: set TMPDIR"
    return Outcomes(said, read)


def _ended(stack: Stack, run_id: UUID) -> State[Any] | None:
    """The state of a run that goes no further by itself."""
    state = stack.flow_run(run_id).state
    return state if state is not None and (state.is_final() or state.is_paused()) else None


def test_no_attempt_to_read_write_or_run_got_further_than_its_refusal(outcomes: Outcomes) -> None:
    got_through = {
        name: said
        for name, said in outcomes.said.items()
        if not name.startswith("promote ")
        and not said.startswith(("Failed: ", "refused by the server"))
    }
    assert got_through == {}


def test_no_code_ran_and_no_file_that_stood_there_changed(place: Place, outcomes: Outcomes) -> None:
    assert not place.marker.exists()
    first_run = place.stack.home / place.first_run
    assert digests(place.stack.folder, first_run) == place.protected


def test_nothing_outside_was_read_and_nothing_of_it_is_on_a_page(place, outcomes) -> None:
    assert outcomes.read == []
    stack = place.stack
    with stack.connected() as client:
        pages = [client.read_artifacts(limit=200, offset=at) for at in range(0, 2000, 200)]
        logs = [client.read_logs(LogFilter(), limit=200, offset=at) for at in range(0, 20000, 200)]
    said = [str(artifact.data) for page in pages for artifact in page]
    said += [log.message for page in logs for log in page]
    said += [file.read_text(errors="replace") for file in stack.folder.glob("*.log")]
    assert said
    assert not any(SECRET in text for text in said)


def test_the_champion_stays_and_the_registry_is_sound(place: Place, outcomes: Outcomes) -> None:
    stack = place.stack
    assert core.read_champion(stack.registry, NAME) == place.champion
    assert outcomes.said["promote what waits"].startswith("Waits for approval: ")
    history = core.history(stack.registry, NAME)
    assert [line["action"] for line in history] == ["promote", "policy"]
    audited = stack.nested_tune("audit", NAME, "--registry", "registry")
    assert audited.returncode == 0, audited.stdout + audited.stderr
