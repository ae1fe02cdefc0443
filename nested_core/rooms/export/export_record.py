"""export.json and its card: what an exported model was made of, and what a new process read of it.

The record lies in an exported folder, and beside a GGUF under the file's name.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from nested_core.errors import DamagedError, join_first_values
from nested_core.records.dataset import PromptFormat
from nested_core.storage.atomic import write_bytes, write_json
from nested_core.storage.json_file import JsonFile
from nested_core.storage.kept_hashes import cached_sha256
from nested_core.storage.untrusted_files import file_type, read_regular
from nested_core.text.document import Document, Facts, Text
from nested_core.text.loss_format import NATS_PER_TOKEN, format_interval, format_loss

RECORD_NAME = "export.json"
CARD_NAME = "README.md"
Quantization = Literal["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]  # of a GGUF's matrices
FEW_BITS = ("q6_k", "q5_k_m", "q4_k_m")  # of these; llama.cpp's own code stores matrices so
WeightFormat = Literal["float32", "bfloat16", "float16", "quantized"] | Quantization
Quantized = Literal["kept", "dequantized"]


@dataclass(frozen=True)
class LogitChange:
    """How near an export's logits are to those with the adapter.

    distance: norm of the difference, relative to the norm of the adapter's logits about their mean.
    carried: the share of the adapter's change of the logits that the export has: 1 all, 0 none.
    prompts: how many were compared, each after its last token.
    """

    distance: float
    carried: float
    bound: float
    prompts: int


@dataclass(frozen=True)
class KeptGain:
    """How much of an adapter's gain on held-out rows an export keeps, and what it lost.

    base, adapter, exported: mean losses in `unit`, such as nats/token.
    needed: the share of the gain that has to be kept, where there is a gain beyond chance.
    allowed: what may be lost, in `unit`: the rest of that gain, or without one a margin.
    share: what is kept of base minus adapter; None if that gain cannot be told from noise.
    interval: the 95 % interval of what was lost, exported minus adapter; None with too few rows.
        The export does not stand where all of it is above `allowed`.
    """

    file: str
    rows: int
    base: float
    adapter: float
    exported: float
    needed: float
    allowed: float
    share: float | None = None
    interval: tuple[float, float] | None = None
    unit: str = NATS_PER_TOKEN

    @property
    def is_lost(self) -> bool:
        """Whether more was lost than is allowed, beyond chance."""
        lost = self.exported - self.adapter if self.interval is None else self.interval[0]
        return not lost <= self.allowed

    def describe_interval(self) -> str:
        """The interval of what was lost, such as `95 % interval -0.002 to +0.004`."""
        if self.interval is None:
            return "too few rows for an interval"
        return f"95 % interval {format_interval(self.interval)}"


@dataclass(frozen=True)
class SuiteCount:
    """How many questions of a suite were answered right, and whether fewer beyond chance."""

    suite: str
    questions: int
    adapter: float
    exported: float
    is_worse: bool

    def describe(self) -> str:
        """Return the counts, such as `82 of 84 questions (adapter 83)`."""
        return f"{self.exported:.4g} of {self.questions} questions (adapter {self.adapter:.4g})"


@dataclass(frozen=True)
class ServedBy:
    """A program that serves the artefact, and what it was seen to do.

    program: with its version, as it says itself; one that was not tried has none.
    reads: the file that was written for it, beside the artefact.
    tokens, shared: those with which the artefact alone goes on after some prompts, and how many of
        them it gives too, up to the first other one after each.
    suites: how many questions it answers right, and the adapter.
    """

    program: str
    reads: str
    is_tried: bool = False
    tokens: int = 0
    shared: int = 0
    suites: tuple[SuiteCount, ...] = ()

    def command(self, folder: Path) -> str:
        """Return the command by which the program serves the artefact, which lies in a folder."""
        path, read = shlex.quote(str(folder / self.reads)), Path(self.reads)
        is_modelfile = read.suffix == ".Modelfile"
        return f"ollama create {shlex.quote(read.stem)} -f {path}" if is_modelfile else f"sh {path}"

    def describe(self) -> str:
        """Return a line, such as `llama-server b1-0c1e570: 128 of 128 tokens of the file alone`."""
        if not self.is_tried:
            return f"not tried in {self.program}"
        told = [f"{self.shared} of {self.tokens} tokens of the file alone"]
        told += [suite.describe() for suite in self.suites]
        return f"{self.program}: {', '.join(told)}"


@dataclass(frozen=True, kw_only=True)
class ExportRecord:
    """The content of the file.

    artefact: "folder" or "gguf"; files has its files with their SHA-256.
    weights: the format of its matrices.
    quantized_base: what became of a quantized base; None for a base that is not quantized.
    source: the adapter as it was named; `version` is its digest, the version's of a registry.
    step: the optimizer step of the adapter; None if it is not recorded.
    trained_on: what it and its ancestors were trained on, as provenance.json has it.
    prompt_format: how the rows that it was trained on begin, as dataset.json has it.
    tokenizer, chat_template: SHA-256 of either; None without a template.
    reader: what read the artefact; `notes` is what to know, such as that llama.cpp did not.
    served: the programs that it was written for.
    problems: why it does not stand; empty where it does.
    """

    artefact: Literal["folder", "gguf"]
    weights: WeightFormat
    quantized_base: Quantized | None
    files: dict[str, str]
    source: str
    version: str
    base: str
    base_fingerprint: str
    tokenizer: str
    chat_template: str | None
    reader: str
    texts: int
    logits: LogitChange
    gain: KeptGain | None
    suites: tuple[SuiteCount, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    packages: dict[str, str]
    step: int | None = None
    trained_on: dict[str, str | None] = field(default_factory=dict)
    prompt_format: PromptFormat | None = None
    served: tuple[ServedBy, ...] = ()

    @property
    def stands(self) -> bool:
        """Whether the artefact does what the adapter does."""
        return not self.problems

    def describe(self) -> str:
        """Return the figures in a line: `kept 98 % of the gain: loss 0.61 (adapter 0.60, ...)`."""
        gain = self.gain
        if gain is None:
            parts = [f"logits within {self.logits.distance:.2g} of the adapter's"]
        else:
            losses = (
                f"loss {format_loss(gain.exported)} (adapter {format_loss(gain.adapter)}, base "
                f"{format_loss(gain.base)})"
            )
            kept = "no gain to keep" if gain.share is None else f"kept {gain.share:.0%} of the gain"
            parts = [f"{kept.replace('%', ' %')}: {losses}"]
        parts += [suite.describe() for suite in self.suites]
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as the file and `export --json` have them; digests in the file alone."""
        verdict = "stands" if self.stands else "refused"
        values = asdict(self)
        del values["trained_on"]
        return {"verdict": verdict, "summary": self.describe()} | values


EXPORT_FILE = JsonFile(ExportRecord, 64 * 2**20)


def record_place(artefact: Path) -> Path:
    """Where the record of an exported folder or GGUF lies."""
    if artefact.is_dir():
        return artefact / RECORD_NAME
    return artefact.with_name(f"{artefact.stem}.{RECORD_NAME}")


def write_export_record(artefact: Path, record: ExportRecord) -> None:
    """Write the record of a new folder or GGUF; a folder gets a card too."""
    write_json(record_place(artefact), record.to_json() | {"trained_on": record.trained_on})
    if artefact.is_dir():
        write_bytes(artefact / CARD_NAME, _render_card(artefact.name, record).encode())


def read_export_record(artefact: Path) -> ExportRecord | None:
    """Read the record of an exported folder or GGUF; None without one.

    A GGUF may have been renamed. Without a record under its name, the one in its folder that has
    its SHA-256 is read; others there may be damaged. Raises DamagedError for a file that is no
    record, and unless the files are those that were exported.
    """
    path = record_place(artefact)
    if file_type(path) == "missing":
        beside = [] if artefact.is_dir() else sorted(path.parent.glob(f"*.{RECORD_NAME}"))
        candidates = [one for one in beside if file_type(one) == "file"]
        digests = cached_sha256([artefact]) if candidates else []
        named = [one for one in candidates if digests[0].encode() in read_regular(one)]
        if not named:
            return None
        path = named[0]
    record = EXPORT_FILE.read(path)
    _require_recorded_files(artefact, record)
    return record


def _require_recorded_files(artefact: Path, record: ExportRecord) -> None:
    """Raise DamagedError unless the files are those that were exported.

    Added weights in a folder count as a change, since mlx_lm reads each `model*.safetensors`. A
    GGUF may have been renamed.
    """
    folder, recorded = artefact, record.files
    if record.artefact == "gguf":
        folder, recorded = artefact.parent, {artefact.name: next(iter(recorded.values()), "none")}
    names = sorted({*recorded, *(path.name for path in artefact.glob("model*.safetensors"))})
    present = [name for name in names if (folder / name).is_file()]
    hashes = dict(zip(present, cached_sha256([folder / name for name in present]), strict=True))
    if changed := [name for name in names if hashes.get(name) != recorded.get(name)]:
        raise DamagedError(
            f"{artefact} is not what {record_place(artefact)} describes. Missing, or other than "
            f"exported: {join_first_values(changed, 3)}. Export {record.source} again, or restore "
            f"the files. If you changed them on purpose, remove {record_place(artefact).name}: the "
            f"folder is a model of its own then."
        )


def _render_card(name: str, record: ExportRecord) -> str:
    """Return the card of an exported folder of this name, as Markdown."""
    headline = (
        f"A base model with an adapter in its weights, exported by nested-tune. "
        f"{'Passed' if record.stands else 'Failed'}: {record.describe()}."
    )
    facts = [
        ("adapter", record.version),
        ("base", f"{Path(record.base).name}, {record.base_fingerprint}"),
        ("weights", record.weights),
        ("read by", record.reader),
        ("all figures", RECORD_NAME),
    ]
    remarks = [Text(problem, "bad") for problem in record.problems]
    remarks += [Text(note, "note") for note in record.notes]
    return f"{Document(name, [Text(headline, is_headline=True), *remarks, Facts(facts)])}\n"
