"""Nights that nobody attends: an adapter learns new facts every night, and something goes wrong.

Each night a process of the run is killed at a drawn moment. In some the server is away, the file
is cut short, or facts of earlier nights have other answers. A worker that died is started again, as
systemd does; nothing else is done by hand. `python -m benchmarks.nights --unattended 30` prints
what was seen. Whoever ends that goes on where it was by the same command.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any, Literal
from uuid import UUID

import yaml
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Cancelled

from benchmarks.learning.judge import Judge
from benchmarks.learning.streams import OWNERS, list_words
from benchmarks.learning.tasks import Row
from flows.rooms.nights.run_list import ACTIVE_TYPES
from nested_core import registry as core
from nested_core.records.start import START_FILE
from nested_core.registry.versions import version_folder
from nested_core.storage.atomic import write_bytes, write_json
from tasks.prefect_server import flow_runs_in
from tests.example import MODEL
from tests.production.processes import processes_with
from tests.production.replayed_nights import (
    NIGHTS_BETWEEN_LOOKS,
    ReplayStack,
    make_a_day_older,
    measure,
)
from tests.production.stack import NESTED_TUNE, wait_for
from tests.webhook_server import WebhookServer

NAME = "facts"
SEED = 20_261_127
FIRST_FACTS, FACTS, CORRECTED = 24, 6, 4
WORDINGS = ("Who has {}?", "I want {}. Where to?")
DAYS_BETWEEN_HOUSEKEEPINGS = 7
NIGHTS_BETWEEN_MEASUREMENTS = 5
SECONDS_AWAY = (20, 60)  # the server, in a night with an outage
FIRST_NIGHT = 60.0  # seconds that the first night is taken to last
LATEST_MOMENT = 0.8  # of the last night's length, for what is drawn
LONGEST_NIGHT = 1800.0
GOES_ON_WITHIN = 300  # after a crash; the automation begins it again 20 seconds later
TOLD_WITHIN = 120
Victim = Literal["training", "parent", "worker", "all"]
VICTIMS: Mapping[Victim, int] = {"training": 13, "parent": 4, "worker": 2, "all": 1}
SETTINGS: dict[str, Any] = {
    "model": f"examples/{MODEL.name}",
    "data": f"examples/{NAME}",
    "num_layers": -1,
    "lora_parameters": {"rank": 8, "alpha": 160},
    "learning_rate": 2.5e-4,
    "mask_prompt": True,
    "batch_size": 5,  # no more than a night holds out
    "training": {"epochs": 12, "warmup_steps": 0.05, "decay": "cosine", "max_grad_norm": 1.0},
    "val_batches": -1,
    "steps_per_report": 0.1,
    "steps_per_eval": 0.25,
    "save_every": 0.05,
    "seed": 1,
}


@dataclass(frozen=True)
class PlannedNight:
    """What a night brings: its facts, and what goes wrong.

    facts: the owner of each word that is told tonight; corrected: those among them that had
        another owner before; taught: those whose second wording is trained on, and not held out.
    moment: when a process is killed, as a share of the last night's length; `away`: for how many
        seconds the server is away, and from when.
    """

    number: int
    facts: dict[str, str]
    corrected: tuple[str, ...]
    taught: frozenset[str]
    has_bad_file: bool
    victim: Victim
    moment: float
    away: float | None
    away_from: float


def plan_nights(nights: int) -> list[PlannedNight]:
    """The nights of a series, the same each time: an outage in one of six, and so on."""
    chance = Random(SEED)
    words = list_words()
    chance.shuffle(words)
    later = range(2, nights + 1)
    outages, corrections, bad = (
        {*chance.sample(later, math.ceil(nights / one_in))} for one_in in (6, 10, 15)
    )
    owners: dict[str, str] = {}
    taught: set[str] = set()
    planned = []
    for number in range(1, nights + 1):
        corrected = tuple(chance.sample(sorted(owners), CORRECTED if number in corrections else 0))
        fresh = [words.pop() for _ in range(FACTS if owners else FIRST_FACTS)]
        taught |= {*(fresh[:1] if owners else fresh[::2])}
        facts = {
            word: chance.choice([o for o in OWNERS if o != owners[word]]) for word in corrected
        }
        facts |= {word: chance.choice(OWNERS) for word in fresh}
        owners |= facts
        planned.append(
            PlannedNight(
                number,
                facts,
                corrected,
                frozenset(taught & facts.keys()),
                has_bad_file=number in bad,
                victim=chance.choices([*VICTIMS], [*VICTIMS.values()])[0],
                moment=chance.uniform(0, LATEST_MOMENT),
                away=chance.uniform(*SECONDS_AWAY) if number in outages else None,
                away_from=chance.uniform(0, LATEST_MOMENT),
            )
        )
    return planned


def split_facts(nights: Sequence[PlannedNight]) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows that are held out, each fact with its newest owner.

    Of most facts the second wording is held out; a corrected one stays where it was.
    """
    facts = {word: owner for night in nights for word, owner in night.facts.items()}
    taught = {word for night in nights for word in night.taught}
    train, held_out = list[Row](), list[Row]()
    for word, owner in facts.items():
        first, second = (Row(wording.format(word), f"Ask {owner}.") for wording in WORDINGS)
        train.append(first)
        (train if word in taught else held_out).append(second)
    return train, held_out


@dataclass(frozen=True)
class SeenNight:
    """What became of a night.

    told: the texts that came to the webhook. killed_after: seconds from the run's beginning; None
    where it had ended before. begun: how often the flow run began. policy: what the run began from.
    """

    number: int
    state: str
    message: str
    told: list[str]
    seconds: float
    victim: str
    killed_after: float | None
    killed_in: str | None
    away: float | None
    corrected: int
    has_bad_file: bool
    begun: int
    policy: str | None
    reason: str | None
    champion: str | None
    reconciled: str | None
    housekeeping: str | None = None
    sizes: dict[str, Any] | None = None
    right: float | None = None
    questions: int | None = None


@dataclass
class UnattendedStack(ReplayStack):
    """A stack whose database, ports and nights are found again by the folder."""

    rows: Path = field(default_factory=Path)

    @property
    def environment(self) -> dict[str, str]:
        vacuum = "PREFECT_SERVER_SERVICES_DB_VACUUM"
        return super().environment | {
            "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "tests.production.quick_ordering",
            f"{vacuum}_LOOP_SECONDS": "30",
            f"{vacuum}_ORPHAN_CLEANUP_LOOP_SECONDS": "30",
        }

    @classmethod
    def open(cls, folder: Path, make: Any, rows: Path) -> UnattendedStack:
        """A new stack in an empty folder, or the one that an earlier call left there."""
        noted = folder / "stack.json"
        cluster = make()
        stack = cls(folder, cluster, rows=rows)
        if noted.exists():
            known = json.loads(noted.read_text())
            shutil.rmtree(cluster.folder)
            stack.port = known["port"]
            cluster.port, cluster.folder = known["database_port"], Path(known["database"])
        else:
            write_json(
                noted,
                {
                    "port": stack.port,
                    "database_port": cluster.port,
                    "database": str(cluster.folder),
                },
            )
        return stack

    @cached_property
    def seen(self) -> list[SeenNight]:
        """The nights that have been played, read from the file of rows."""
        lines = self.rows.read_text().splitlines() if self.rows.exists() else []
        return [SeenNight(**json.loads(line)) for line in lines]

    def begin(self, url: str) -> None:
        """Start database and server, deploy the adapter and begin its workers."""
        if (self.database.folder / "data").exists():
            self._end_what_was_left()
            self.database.start()
            self.start_server()
        else:
            self.start("--notify", url)
        (self.home / f"{NAME}.yaml").write_text(yaml.safe_dump(self.settings))
        (self.home / "examples" / NAME).mkdir(exist_ok=True)
        done = self.nested_tune("deploy", "-c", f"{NAME}.yaml", "--notify", url)
        assert done.returncode == 0, done.stderr
        for pool in ("mlx-gpu", "cpu"):
            self.start_worker(pool)
        with self.connected() as client:
            for run in client.read_flow_runs(flow_run_filter=flow_runs_in(ACTIVE_TYPES)):
                client.set_flow_run_state(run.id, Cancelled(), force=True)  # of an earlier call
            # The nights come when they are asked for.
            for deployment in client.read_deployments():
                for schedule in deployment.schedules:
                    client.update_deployment_schedule(deployment.id, schedule.id, active=False)

    def _end_what_was_left(self) -> None:
        """End the processes of a call that was killed."""
        running = self.database.folder / "data" / "postmaster.pid"
        if running.exists():
            os.kill(int(running.read_text().split()[0]), signal.SIGINT)
            wait_for(lambda: not running.exists())
        for process in processes_with(f"NESTED_TUNE_HOME={self.home}"):
            os.kill(process, signal.SIGKILL)

    @property
    def settings(self) -> dict[str, Any]:
        """The adapter's configuration."""
        return SETTINGS | {"registry": {"path": "registry", "name": NAME}}

    def champion_folder(self) -> Path:
        """The champion's version."""
        return version_folder(self.registry, NAME, str(core.read_champion(self.registry, NAME)))


def play(stack: UnattendedStack, webhook: WebhookServer, nights: int) -> Iterator[SeenNight]:
    """Play the nights that are left, one after the other, and write a row for each."""
    planned = plan_nights(nights)
    for night in planned[len(stack.seen) :]:
        if night.away is None and owes_outage(planned, stack.seen):
            night = replace(night, away=float(SECONDS_AWAY[0]))  # noqa: PLW2901
        seen = _play(stack, webhook, night, planned)
        if night.number % DAYS_BETWEEN_HOUSEKEEPINGS == 0 or night.number == nights:
            # No run is older than today here.
            ended = stack.wait(stack.submit(f"housekeeping/{NAME}-housekeeping", keep_days=0))
            seen = replace(seen, housekeeping=str(ended.state.message) if ended.state else None)
        make_a_day_older(stack)
        if night.number % NIGHTS_BETWEEN_MEASUREMENTS == 0 or night.number == nights:
            seen = replace(seen, sizes=asdict(measure(stack, night.number)))
            right = judge(stack.champion_folder(), questions_after(planned[: night.number]))
            seen = replace(seen, right=right[0], questions=right[1])
        stack.seen.append(seen)
        with stack.rows.open("a") as rows:
            rows.write(json.dumps(asdict(seen)) + "\n")
        yield seen


def owes_outage(planned: Sequence[PlannedNight], seen: Sequence[SeenNight]) -> bool:
    """Whether the run of an earlier night had ended before its outage."""
    came = sum(night.away is not None for night in seen)
    return came < sum(night.away is not None for night in planned[: len(seen)])


def _play(
    stack: UnattendedStack, webhook: WebhookServer, night: PlannedNight, planned: list[PlannedNight]
) -> SeenNight:
    """One night, from its file to the look that comes after it."""
    promoted = [seen.number for seen in stack.seen if seen.state == "Promoted"]
    since = planned[max(promoted, default=0) : night.number]
    write_data(stack.home / "examples" / NAME, since, is_cut=night.has_bad_file)
    told, there = len(webhook.texts), {*(stack.home / "runs").glob("*")}
    run_id = stack.submit(f"finetune/{NAME}-nightly")
    faults = Faults(stack, night, run_id)
    run = faults.inject_until_told(estimate_seconds(stack.seen, night))
    seconds = time.monotonic() - faults.began
    if run.run_count > 1 or run.state_type != StateType.COMPLETED:
        ended = str(run.state_name)  # a text of the crash may have come before
        with suppress(AssertionError):  # a row without such a text says that nobody was told
            wait_for(lambda: any(ended in text for text in webhook.texts[told:]), TOLD_WITHIN)
    looked = None
    if night.number % NIGHTS_BETWEEN_LOOKS == 0:
        look = stack.submit(f"reconcile/{NAME}-hourly")
        looked = stack.wait(look, seconds=LONGEST_NIGHT).state
    folders = sorted({*(stack.home / "runs").glob("*")} - there, key=lambda path: path.name)
    start = folders[-1] / "start.json" if folders else None
    begun_from = START_FILE.read(start) if start is not None and start.exists() else None
    has_champion = NAME in core.list_names(stack.registry) if stack.registry.is_dir() else False
    return SeenNight(
        number=night.number,
        state=str(run.state_name),
        message=str(run.state.message if run.state else None),
        told=webhook.texts[told:],
        seconds=round(seconds, 1),
        victim=night.victim,
        killed_after=faults.killed_after,
        killed_in=faults.killed_in,
        away=None if faults.away_since is None else night.away,
        corrected=len(night.corrected),
        has_bad_file=night.has_bad_file,
        begun=run.run_count,
        policy=None if begun_from is None else begun_from.choice.policy,
        reason=None if begun_from is None else begun_from.choice.reason,
        champion=core.read_champion(stack.registry, NAME) if has_champion else None,
        reconciled=None if looked is None else f"{looked.name}: {looked.message}",
    )


def estimate_seconds(seen: list[SeenNight], night: PlannedNight) -> float:
    """How long a night lasts at least, by the last ones: faults are to come before its end."""
    if night.has_bad_file:
        return FIRST_NIGHT / 4
    return min([FIRST_NIGHT, *(s.seconds for s in seen[-3:] if not s.has_bad_file)])


def write_data(folder: Path, nights: list[PlannedNight], *, is_cut: bool) -> None:
    """What was told since the last champion; of a file that is cut the last row lacks its end."""
    for split, rows in zip(("train", "valid"), split_facts(nights), strict=True):
        lines = [json.dumps({"prompt": row.prompt, "completion": row.answer}) for row in rows]
        text = "\n".join(lines) + "\n"
        write_bytes(folder / f"{split}.jsonl", (text[:-12] if is_cut else text).encode())


class Faults:
    """What goes wrong in a night, and when it did."""

    def __init__(self, stack: UnattendedStack, night: PlannedNight, run_id: UUID) -> None:
        self.stack, self.night, self.run_id = stack, night, run_id
        self.killed_after: float | None = None
        self.killed_in: str | None = None
        self.away_since: float | None = None
        self.is_away = False
        stack.wait(run_id, "Running", *ENDED_AT_ONCE, seconds=LONGEST_NIGHT)
        self.began = time.monotonic()

    def inject_until_told(self, estimate: float) -> FlowRun:
        """Kill and cut off as planned; the run once nothing goes on by itself any more."""
        kill_at, away_from = (
            share * estimate for share in (self.night.moment, self.night.away_from)
        )
        crashed_since: float | None = None
        while True:
            now = time.monotonic() - self.began
            assert now < LONGEST_NIGHT, self.stack.logs()
            if self.killed_after is None and now >= kill_at:
                self._kill(now)
            if self.night.away is not None and self.away_since is None and now >= away_from:
                self.stack.kill_server()
                self.away_since, self.is_away = now, True
            if self.is_away and now >= (self.away_since or 0) + (self.night.away or 0):
                self.stack.start_server()
                self.is_away = False
            if not self.is_away:
                run = self.stack.flow_run(self.run_id)
                if run.state is not None and run.state.is_final():
                    crashed_since = (crashed_since or now) if run.state_name == "Crashed" else None
                    if crashed_since is None or run.run_count > 1:
                        return run
                    if now > crashed_since + GOES_ON_WITHIN:
                        return run
                else:
                    crashed_since = None
            time.sleep(0.3)

    def _kill(self, now: float) -> None:
        """End the victim, if the run still has a process; a worker is started again."""
        processes = self.stack.engine_processes(self.run_id)
        if not processes:
            return
        if not self.is_away:
            self.killed_in = self._find_task()
        victim = self.night.victim
        if victim in ("worker", "all"):
            self.stack.workers["mlx-gpu"].kill()
        chosen = {"training": processes[-1:], "parent": processes[:1], "worker": []}
        for process in chosen.get(victim, self.stack.processes_of(self.run_id)):
            os.kill(process, signal.SIGKILL)
        if victim in ("worker", "all"):
            self.stack.workers["mlx-gpu"].wait()
            self.stack.start_worker("mlx-gpu")
        self.killed_after = round(now, 1)

    def _find_task(self) -> str | None:
        """The task that is under way."""
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=[self.run_id]))
        with self.stack.connected() as client:
            found = client.read_task_runs(flow_run_filter=wanted)
        running = [task.name.split()[0] for task in found if task.state_name == "Running"]
        return running[-1] if running else None


ENDED_AT_ONCE = ("Failed: data", "Crashed", "Failed")


def questions_after(nights: list[PlannedNight]) -> list[Row]:
    """Each fact in both wordings, with its newest answer."""
    return [row for rows in split_facts(nights) for row in rows]


def judge(adapter: Path, questions: list[Row]) -> tuple[float, int]:
    """The share of questions that an adapter answers right, and how many they are."""
    judged = Judge(MODEL, questions, []).judge(adapter)
    return round(float(judged.right.mean()), 4), len(questions)


def train_jointly(stack: UnattendedStack, nights: list[PlannedNight]) -> Path:
    """The adapter of one training from the base on the facts of all nights, with no registry."""
    data = stack.home / "examples" / "joint"
    data.mkdir(exist_ok=True)
    write_data(data, nights, is_cut=False)
    settings = SETTINGS | {"data": "examples/joint"}
    (stack.home / "joint.yaml").write_text(yaml.safe_dump(settings))
    words = [NESTED_TUNE, "train", "-c", "joint.yaml", "--run-dir", "joint"]
    subprocess.run(words, cwd=stack.home, check=True, capture_output=True)
    return stack.home / "joint" / "adapter"
