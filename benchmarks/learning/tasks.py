"""Tasks of real text, read from a folder that the user names: prompts, and answers to give exactly.

PROTOCOL.md and PROTOCOL-2.md have the commands that fetch that folder. No row that judges has the
prompt of a row that trains or chooses. `geography` is the example's own data set, and needs no
folder.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 20_261_124
ALL = 10**6
JUDGED_OF_256 = 64  # of the answers of nl2bash and e2e, by the first byte of their SHA-256
GEOGRAPHY = Path(__file__).resolve().parents[2] / "examples" / "geography"
CLINC = "oos-eval/data/data_full.json"
BANKING = "task-specific-datasets/banking_data"
RESTAURANT = "task-specific-datasets/span_extraction/restaurant8k"
SNIPS = "nlu-benchmark/2017-06-custom-intent-engines"
NL2BASH = "nl2bash/data/bash"
E2E = "e2e-dataset"
SHA256 = {
    CLINC: "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0",
    f"{BANKING}/train.csv": "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
    f"{BANKING}/test.csv": "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
    f"{RESTAURANT}/train_0.json": (
        "90cb03e1cdd3ee141829605955a54d946308e1558250ca1e7413f260443bc6a4"
    ),
    f"{RESTAURANT}/test.json": "31dbbb2fa36319f9f1f2c3ed441619ebf6e081f82aefd484b98caf86cd826ab0",
    f"{NL2BASH}/all.nl": "1db0c529c350b463919624550b8f5882a97c42ad5051c7d49fbc496bc4e8b770",
    f"{NL2BASH}/all.cm": "3a72eaced7fa14a0938354cefc42b2dcafb2d47297102f1279086e18c3abe57e",
    f"{E2E}/devset.csv": "fc26b78cdb849c80545f513b223d1e051138b43882eeb79e3eb153e689c864f9",
    f"{E2E}/testset_w_refs.csv": "edc8db685e39bb9824d5bd70c18b1c9b0412d14b527aa960e2d1c8251ee15ccd",
}
# An intent of Snips' with the SHA-256 of its training and its validation file
SNIPS_SHA256 = {
    "AddToPlaylist": (
        "fee1b4645352e70ed8a40f1f87c3b53fc3bf75f8ebc82252a22b82c107e75b01",
        "14cc9ee49ae477b1452632a6e835498cf4c32da397b16967c82abb3e50403e83",
    ),
    "BookRestaurant": (
        "7677e82cd6e9a8191f0a4502568c786278c984900b4796d3628e46f1abf73ef4",
        "4f7258ccc768b777b2eb8916532db9aa50dbd058ddf1ffb0dc59218963e7442a",
    ),
    "GetWeather": (
        "86f414b2ad8a993134d85d16e25e5d337beae47cef993c0af2a5f440405c60f6",
        "60c095e193655d6ca92be220fed3926ca25e18cd70c85664145efe25d80993af",
    ),
    "PlayMusic": (
        "901ddbe9781d1fdb8196e789c543f80df3d29ca6e237da64947905adcc0312e4",
        "922212775e26259d5bffeaf79b6048d070ca017d229df00b2cc9800f71c75d20",
    ),
    "RateBook": (
        "bb43e4b74134300d5766f6b420d0357a63402987a225f6dc92c806c9c040ce04",
        "c1f8b4114da0bb5e8afd78a8062766e18b2eabb0e717539598db01b09d04619b",
    ),
    "SearchCreativeWork": (
        "87b3432de48c71c205aa5238b41d9e3f2d70bdfcd0bea2427544fb9e4bd5e5bb",
        "8a5e830eddb185d3e4a9d27ded140a145d04766bdce0e58834676ede32d13e77",
    ),
    "SearchScreeningEvent": (
        "5447e9440c02e2fb08c3ae16b9f58a4d1332b4bc77fd34691402b02aa4399765",
        "81e1445713e03c7c3e615353c5f3fee05f369fe9834100b9b9735900a96b9498",
    ),
}
for _intent, _digests in SNIPS_SHA256.items():
    for _name, _digest in zip(
        (f"train_{_intent}_full", f"validate_{_intent}"), _digests, strict=True
    ):
        SHA256[f"{SNIPS}/{_intent}/{_name}.json"] = _digest


@dataclass(frozen=True)
class Row:
    """A user's message and the answer that counts as right."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Splits:
    """The rows that train, those that choose steps, rates and scales, and those that judge."""

    train: tuple[Row, ...]
    choose: tuple[Row, ...]
    judge: tuple[Row, ...]

    def write(self, folder: Path) -> None:
        """Write train.jsonl, and valid.jsonl where there are rows for it, as both programs read."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("train", self.train), ("valid", self.choose)):
            lines = [json.dumps({"prompt": row.prompt, "completion": row.answer}) for row in rows]
            if rows:
                (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Counts:
    """How many rows of each split are taken; a task with fewer has all of them.

    longest: characters of prompt and answer together; longer rows are left out.
    answers: of a task with more different answers to train on, rows of the first ones are taken.
    is_fresh: the rows that judge are such as no study before PROTOCOL-4.md has seen (fresh.py).
    """

    train: int = 1336
    choose: int = 400
    judge: int = 2000
    longest: int = ALL
    answers: int = ALL
    is_fresh: bool = False


def read_task(name: str, data: Path | None, counts: Counts) -> Splits:
    """The splits of a task, always the same; SystemExit where a file is not the recorded one.

    geography is taken whole.
    """
    folder = data
    if name == "geography":
        folder, counts = GEOGRAPHY, Counts()
    if folder is None:
        raise SystemExit(f"{name} is read from the folder of --data; PROTOCOL.md fetches it.")
    pools = READERS[name](folder)
    answers = set(sorted({row.answer for row in pools[0]})[: counts.answers])
    chance = random.Random(SEED)
    seen = set[str]()
    splits = []
    wanted = (counts.train, counts.choose, counts.judge)
    for rows, count in zip(pools, wanted, strict=True):
        fresh = {
            row.prompt: row
            for row in rows
            if row.prompt not in seen
            and len(row.prompt) + len(row.answer) <= counts.longest
            and (row.answer in answers or counts.answers >= ALL)
        }
        taken = list(fresh.values())
        chance.shuffle(taken)
        splits.append(tuple(taken[:count]))
        seen.update(row.prompt for row in splits[-1])
    return Splits(*splits)


def _checked(data: Path, name: str) -> Path:
    """The file, if its digest is the recorded one."""
    path = data / name
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256[name]:
        raise SystemExit(f"{path} has the SHA-256 {digest}, and PROTOCOL.md was for {SHA256[name]}")
    return path


def _clinc150(data: Path) -> list[list[Row]]:
    """A question to an assistant, and which of 150 intents it has."""
    splits = json.loads(_checked(data, CLINC).read_text(encoding="utf-8"))
    return [
        [Row(text, intent.replace("_", " ")) for text, intent in splits[split]]
        for split in ("train", "val", "test")
    ]


def _banking77(data: Path) -> list[list[Row]]:
    """A customer's question to a bank, and which of 77 intents it has."""
    pools = []
    for split in ("train", "test"):
        with _checked(data, f"{BANKING}/{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = [(line["text"].strip(), line["category"]) for line in csv.DictReader(file)]
        pools.append([Row(text, intent.replace("_", " ")) for text, intent in rows])
    train, test = pools
    return [train, train, test]


def _restaurant8k(data: Path) -> list[list[Row]]:
    """A guest's message with what was asked for, and the slots that it fills, as JSON."""
    train, test = (
        [_slots(line) for line in json.loads(_checked(data, f"{RESTAURANT}/{name}").read_bytes())]
        for name in ("train_0.json", "test.json")
    )
    return [train, train, test]


def _slots(line: dict[str, Any]) -> Row:
    text = line["userInput"]["text"]
    asked = line.get("context", {}).get("requestedSlots", [])
    slots = {}
    for label in line.get("labels", []):
        span = label["valueSpan"]
        slots[label["slot"]] = text[span.get("startIndex", 0) : span["endIndex"]]
    return Row(f"({', '.join(asked)}) {text}", json.dumps(slots, sort_keys=True))


def _snips(data: Path) -> list[list[Row]]:
    """A command to an assistant; its intent, and the words that fill its slots, as JSON."""
    train, test = list[Row](), list[Row]()
    for intent in SNIPS_SHA256:
        for name, rows in ((f"train_{intent}_full", train), (f"validate_{intent}", test)):
            path = _checked(data, f"{SNIPS}/{intent}/{name}.json")
            lines = json.loads(path.read_text(encoding="utf-8", errors="replace"))[intent]
            rows += [_intent_and_slots(intent, line["data"]) for line in lines]
    return [train, train, test]


def _intent_and_slots(intent: str, parts: Sequence[dict[str, str]]) -> Row:
    slots = {part["entity"]: part["text"].strip() for part in parts if "entity" in part}
    answer = json.dumps({"intent": intent} | slots, sort_keys=True, ensure_ascii=False)
    return Row("".join(part["text"] for part in parts).strip(), answer)


def _nl2bash(data: Path) -> list[list[Row]]:
    """What to do, in English, and the shell command for it, with single spaces between its words.

    A command that appears with several descriptions is in one split alone.
    """
    files = (_checked(data, f"{NL2BASH}/{name}") for name in ("all.nl", "all.cm"))
    asked, commands = (_lines(path) for path in files)
    pairs = zip(asked, commands, strict=True)
    return _split_by_answer(Row(" ".join(q.split()), " ".join(a.split())) for q, a in pairs)


def _split_by_answer(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that train, that choose and that judge: each answer judges, or it does neither."""
    pools: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        is_judged = hashlib.sha256(row.answer.encode()).digest()[0] < JUDGED_OF_256
        pools[is_judged].append(row)
    train, judge = pools
    return [train, train, judge]


def _e2e(data: Path) -> list[list[Row]]:
    """A sentence about a restaurant, and the attributes that it was written from, as JSON.

    Both published files are split anew: in one every venue is a coffee shop, in the other few are.
    """
    files = (_checked(data, f"{E2E}/{name}") for name in ("devset.csv", "testset_w_refs.csv"))
    texts = (path.read_text(encoding="utf-8") for path in files)
    return _split_by_answer(
        _attributes(line) for text in texts for line in csv.DictReader(io.StringIO(text))
    )


def _attributes(line: dict[str, str]) -> Row:
    pairs = (part.strip().removesuffix("]").split("[", 1) for part in line["mr"].split("],"))
    return Row(line["ref"].strip(), json.dumps(dict(pairs), sort_keys=True, ensure_ascii=False))


def _geography(data: Path) -> list[list[Row]]:
    """A country to see, and the sentence that names its capital."""
    pools = []
    for name in ("train", "valid"):
        chats = (json.loads(line)["messages"] for line in _lines(data / f"{name}.jsonl"))
        pools.append([Row(user["content"], reply["content"]) for user, reply in chats])
    judge = []
    for line in _lines(data / "held_out.jsonl"):
        question = json.loads(line)
        prompt = question["messages"][0]["content"]
        country = prompt.removeprefix("I want to see ").removesuffix(". Where to?")
        judge.append(Row(prompt, f"Go and see {question['expected']}, the capital of {country}!"))
    return [*pools, judge]


def _lines(path: Path) -> Iterable[str]:
    return path.read_text(encoding="utf-8").splitlines()


READERS: dict[str, Callable[[Path], list[list[Row]]]] = {
    "clinc150": _clinc150,
    "banking77": _banking77,
    "restaurant8k": _restaurant8k,
    "snips": _snips,
    "nl2bash": _nl2bash,
    "e2e": _e2e,
    "geography": _geography,
}
