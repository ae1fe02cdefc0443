"""A base with its adapter as a model of its own, kept only where it answers as the adapter did.

It is written beside its place, read by a fresh process alone, judged, and put in its place; one
that does not stand is put under another name, for a look.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from nested_core import seams
from nested_core.backend import RECORDED_PACKAGES
from nested_core.config.loading import parse_config, parse_tasks
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import TaskSection
from nested_core.data.dataset_loading import load_run_data
from nested_core.errors import ConfigError, DamagedError, DatasetError, GateRejected, shorten
from nested_core.gate.evidence.champion_adapter import shape_like_adapter
from nested_core.gate.tensors.base_compatibility import base_reasons, fingerprint_reasons
from nested_core.measure.losses.held_out_loss import LoadedBase, read_held_out_examples
from nested_core.models.adapter_formats import Conversion, load_peft_format
from nested_core.models.base_model import (
    TrainedTokenizer,
    find_model_folder,
    fingerprint_base_model,
    model_compute_dtype,
    read_model_config,
)
from nested_core.pipeline.named_adapters import find_named_adapter
from nested_core.pipeline.named_models import NamedModel, find_model, read_training_config
from nested_core.records.dataset import read_dataset_record
from nested_core.records.result import read_result
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry.versions import PROVENANCE_NAME, read_provenance
from nested_core.rooms.export.export_card import render_export_card
from nested_core.rooms.export.export_record import (
    ExportRecord,
    Quantized,
    WeightFormat,
    card_place,
    digest_template,
    read_export_record,
    record_place,
    write_export_record,
)
from nested_core.rooms.export.fresh_reading import Reading, has_llama_cpp, read_in_fresh_process
from nested_core.rooms.export.fusing import QUANTIZATION_KEYS, load_fused, write_model_folder
from nested_core.rooms.export.gguf import Quantization, read_vocabulary, unpack_gguf, write_gguf
from nested_core.rooms.export.gguf.families import find_family
from nested_core.rooms.export.gguf.vocabulary import Vocabulary, read_chat_template
from nested_core.rooms.export.judgement import judge_reading
from nested_core.rooms.export.reference import (
    HeldOutRows,
    Reference,
    choose_rows,
    measure_reference,
)
from nested_core.storage.adapter import Adapter
from nested_core.storage.atomic import TEMPORARY_PREFIX, sync_path, write_bytes
from nested_core.storage.canary_file import CANARY_NAME, Canary, parse_canary
from nested_core.storage.checkpoint_verification import checkpoint_step
from nested_core.storage.manifest import MANIFEST_NAME, verify_manifest
from nested_core.storage.output_places import require_absent_or_empty, require_output_file
from nested_core.storage.removal import find_reason_to_keep
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import file_type, read_regular, regular_sha256

NOT_RUN = "tensors and metadata checked, not run in llama.cpp"
REJECTED = "rejected"
FORMATS: dict[mx.Dtype, WeightFormat] = {
    mx.float32: "float32",
    mx.bfloat16: "bfloat16",
    mx.float16: "float16",
}
OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    path: the folder or file.
    record: what was measured of it, as export.json has it; None for PEFT, which is a conversion of
        the adapter bit for bit.
    notes: what is to be known of it.
    """

    path: Path
    record: ExportRecord | None
    notes: tuple[str, ...] = ()

    @property
    def upload_command(self) -> str:
        """The command that would publish it; nothing is published here."""
        return f"hf upload USER/NAME {shlex.quote(str(self.path))}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `export --json` prints them."""
        record = {} if self.record is None else self.record.to_json()
        return {"path": str(self.path), "notes": list(self.notes)} | record

    def __repr__(self) -> str:
        said = "" if self.record is None else f": {self.record.describe()}"
        return f"Export({self.path}{said})"


@dataclass(frozen=True)
class _Written:
    """What was written: the format of its matrices, and what its tokenizer's SHA-256 has to be."""

    weights: WeightFormat
    quantized_base: Quantized | None
    tokenizer: str


@dataclass(frozen=True)
class _Source:
    """An adapter to export, with what is known of its training."""

    model: NamedModel
    adapter: Adapter
    config: FineTuneConfig
    is_config_known: bool
    canary: Canary | None
    step: int | None
    note: str | None


def export(
    what: str | Path,
    *,
    fused: str | Path | None = None,
    gguf: str | Path | None = None,
    peft: str | Path | None = None,
    quantize: Quantization = "f16",
    dequantize: bool = False,
    suites: Sequence[str | Path | Mapping[str, Any] | TaskSection] = (),
    data: str | Path | None = None,
    registry: Path | None = None,
    base_model: str | None = None,
    on_stage: OnStage | None = None,
) -> Export:
    """Write a base with its adapter as one model, and keep it only where it does as the adapter.

    Args:
        what: an adapter of mlx_lm or PEFT, a run, NAME, NAME@VERSION or REGISTRY/NAME.
        fused: the new folder of a model that mlx_lm loads.
        gguf: the new file that llama.cpp reads. One of `fused`, `gguf` and `peft` is given.
        peft: the new folder of an adapter for PEFT, converted bit for bit.
        quantize: the format of a GGUF's matrices, f16 or q8_0.
        dequantize: whether a quantized base is not quantized again in a folder; in a GGUF it never
            is.
        suites: questions that both are asked; by default those of the run's gate.tasks, by which
            one without a score is asked and scored, or by `contains` where it is not among them.
        data: held-out examples by which the kept gain is measured; the run's own by default.
        registry: where a NAME is looked for; `registry` by default.
        base_model: the base of an adapter that names none, or another place of it.
        on_stage: called with what is done next, in a few words.

    Raises GateRejected where the model does not do as the adapter, which then lies under another
    name; ConfigError for an unknown name, a place that is taken, and a family or tokenizer that
    GGUF is not written of; DamagedError for damaged files.
    """
    places = [place for place in (fused, gguf, peft) if place is not None]
    if len(places) != 1:
        raise ConfigError("export: give one of --fused DIR, --gguf FILE and --peft DIR.")
    target = Path(os.path.expanduser(places[0]))
    if peft is not None:
        return Export(target, None, convert_for_peft(what, target, registry, base_model).notes)
    if gguf is None:
        require_absent_or_empty(target, flag="--fused")
    else:
        require_output_file(target, "--gguf")
        if taken := _list_taken(target, is_folder=False):
            raise ConfigError(f"{taken[0]} exists already. Nothing is written over.")
    with tempfile.TemporaryDirectory(prefix="nested-tune-") as temporary:
        source = _read_source(str(what), registry, base_model, Path(temporary), suites)
        exporting = _Exporting(source, target, data, on_stage)
        with exporting.blas_threads:
            return exporting.run(None if gguf is None else quantize, dequantize=dequantize)


def convert_for_peft(
    what: str | Path, target: Path, registry: Path | None = None, base_model: str | None = None
) -> Conversion:
    """Write an adapter into a new folder for PEFT, bit for bit.

    Arguments and errors are those of `export`; ConfigError too where the room peft is not there.
    """
    peft = load_peft_format("--peft")
    require_absent_or_empty(target, flag="--peft")
    return peft.export_adapter(find_named_adapter(Path(what), registry).folder, target, base_model)


def _read_source(
    what: str,
    registry: Path | None,
    base_model: str | None,
    temporary: Path,
    suites: Sequence[str | Path | Mapping[str, Any] | TaskSection],
) -> _Source:
    """The adapter that a person means; a version and a run's verdict are hashed again."""
    model, run = find_model(what, registry, base_model, temporary)
    adapter = model.adapter
    if adapter is None:
        raise ConfigError(f"{what} is a base without an adapter: there is nothing to export.")
    folder = Path(os.path.realpath(adapter.path))
    if (folder / MANIFEST_NAME).exists():
        verify_manifest(folder)
    config = read_training_config(folder, run)
    _read_trained_tokenizer(folder, run).require_in(find_model_folder(model.model), what)
    is_known = config is not None
    if config is None:
        config = parse_config({"model": model.model, "num_layers": -1}, source="the adapter")
    tasks = parse_tasks(suites, config.gate.tasks) or config.gate.tasks
    changes = {"model": model.model, "gate": config.gate.model_copy(update={"tasks": tasks})}
    config = config.model_copy(update=changes)
    canary = (folder if run is None else run.path) / CANARY_NAME
    recorded = parse_canary(read_regular(canary), canary) if canary.is_file() else None
    step, note = _describe_origin(folder, run)
    config = shape_like_adapter(adapter, config)
    return _Source(model, adapter, config, is_known, recorded, step, note)


def _describe_origin(folder: Path, run: RunDirectory | None) -> tuple[int | None, str | None]:
    """The optimizer step of an adapter, and which step of which run it is, judged or not.

    Nothing for an adapter's folder without a run or a verdict.
    """
    gate = folder / GATE_NAME if run is None else run.gate
    verdict = read_verdict(gate) if gate.is_file() else None
    if run is None:
        step = None if verdict is None else verdict.adapter_step
        return step, None if step is None else f"step {step}, which passed the gate"
    is_trained = run.result.is_file()
    step = read_result(run.result).adapter_step if is_trained else checkpoint_step(folder)
    if verdict is None:
        ended = "" if is_trained else " that was stopped, or trains still"
        return step, f"step {step} of a run{ended}: it was not judged by the gate"
    passed = "passed the gate" if verdict.has_passed else f"the gate rejected: {verdict.summary()}"
    return step, f"step {step} of a run, which {passed}"


def _read_trained_tokenizer(folder: Path, run: RunDirectory | None) -> TrainedTokenizer:
    """What is recorded of the tokenizer that an adapter was trained with."""
    if run is not None and run.dataset.is_file():
        recorded = read_dataset_record(run.dataset)
        return TrainedTokenizer(recorded.chat_template, recorded.vocabulary)
    if run is not None or not (folder / PROVENANCE_NAME).is_file():
        return TrainedTokenizer()
    provenance = read_provenance(folder)
    return TrainedTokenizer(provenance.get("chat_template"), provenance.get("vocabulary"))


class _Exporting:
    """One export, from measuring its reference to putting it in its place.

    Attributes:
        blas_threads: from the moment that the base is loaded, the quicker number of them.
    """

    def __init__(
        self, source: _Source, target: Path, data: str | Path | None, on_stage: OnStage | None
    ) -> None:
        self._source = source
        self._target = target
        self._data = data
        self._on_stage = on_stage
        self._notes = [] if source.note is None else [source.note]
        self._folder = find_model_folder(source.model.model)
        self.blas_threads = ExitStack()

    def run(self, quantization: Quantization | None, *, dequantize: bool) -> Export:
        """Write a folder, or with a quantization a GGUF, judge it and put it in its place."""
        fingerprint_base_model(self._folder, max_age=0)
        if reasons := fingerprint_reasons(self._source.adapter.config, self._folder):
            raise ConfigError(f"{self._source.model.name}: {reasons[0].message}.")
        self._begin("measuring the base and the adapter")
        reference = self._measure_reference()
        mx.clear_cache()
        self._target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=TEMPORARY_PREFIX, dir=self._target.parent
        ) as beside:
            draft = Path(beside, self._target.name)
            self._begin("fusing and writing")
            if quantization is None:
                written = self._write_folder(draft, dequantize=dequantize)
            else:
                written = self._write_gguf(draft, quantization)
            mx.clear_cache()
            self._begin("reading what was written in a new process")
            record = self._judge(draft, written, reference, self._read(draft, written, reference))
            write_export_record(record_place(draft), record)
            write_bytes(card_place(draft), render_export_card(draft.name, record).encode())
            place = _publish(draft, self._target, is_rejected=not record.stands)
        if record.stands and place == self._target:
            return Export(self._target, record, record.notes)
        if record.stands:
            raise ConfigError(
                f"{self._target} appeared while the export was measured, and nothing is written "
                f"over. The export passed ({record.describe()}) and lies at {place}: move it where "
                f"it belongs."
            )
        problems = "".join(f"\n  {problem}" for problem in record.problems)
        again = "\nWith --dequantize its weights stay as they were fused."
        raise GateRejected(
            f"{self._target} was not kept: {record.describe()}.{problems}\nIt lies at {place} for "
            f"a look.{again if written.quantized_base == 'kept' else ''}"
        )

    def _begin(self, stage: str) -> None:
        if self._on_stage is not None:
            self._on_stage(stage)

    def _measure_reference(self) -> Reference:
        """Base and adapter by the run's own rows and suites, or those that were given."""
        config = self._leave_out_sampled_suites()
        base = LoadedBase.load(config)
        adapter = self._source.adapter
        if reasons := base_reasons(adapter, base.parameters, base.folder):
            raise ConfigError(f"{self._source.model.name} does not fit: {reasons[0].message}.")
        for using_threads in seams.load_all("blas_threads"):
            self.blas_threads.enter_context(using_threads(base.model))
        rows, source = self._find_rows(config), self._source
        return measure_reference(
            config, base, adapter, rows, source.canary, prompt_format=source.model.prompt_format
        )

    def _leave_out_sampled_suites(self) -> FineTuneConfig:
        """The configuration without suites whose answers are drawn: readers answer greedily."""
        config = self._source.config
        sampled = [task.name for task in config.gate.tasks if task.temperature > 0]
        if sampled:
            self._notes.append(f"not asked, as answers are drawn: {', '.join(sampled)}")
        tasks = tuple(task for task in config.gate.tasks if task.name not in sampled)
        return config.model_copy(update={"gate": config.gate.model_copy(update={"tasks": tasks})})

    def _find_rows(self, config: FineTuneConfig) -> HeldOutRows | None:
        """The held-out rows of the file that was given, or of what the adapter was trained with."""
        splits = {}
        if self._data is not None:
            gate = config.gate.model_copy(update={"held_out": str(self._data)})
            config = config.model_copy(update={"gate": gate})
        elif not self._source.is_config_known:
            self._notes.append("the kept gain was not measured: --data FILE names held-out rows")
            return None
        try:
            if self._data is None:
                _, loaded = load_run_data(config)
                splits = {name: split for name, split in loaded.items() if len(split)}
            held_out = read_held_out_examples(config, splits)
        except (ConfigError, DatasetError, OSError) as error:
            if self._data is not None:
                raise
            self._notes.append(
                f"the kept gain was not measured, as the run's data cannot be read: "
                f"{shorten(error, 200)}; --data FILE names other held-out rows"
            )
            return None
        return None if held_out is None else choose_rows(held_out, config)

    def _fuse(self, *, dequantize: bool, dtype: mx.Dtype | None = None) -> tuple[Any, Any, Any]:
        return load_fused(
            self._folder,
            self._source.adapter,
            dequantize=dequantize,
            dtype=dtype,
            trust_remote_code=self._source.model.trust_remote_code,
        )

    def _write_folder(self, draft: Path, *, dequantize: bool) -> _Written:
        model, tokenizer, config = self._fuse(dequantize=dequantize)
        write_model_folder(draft, self._folder, model, config)
        digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        if "quantization" in config:
            return _Written("quantized", "kept", digest)
        leaves: Any = tree_flatten(model.parameters())
        dtype = next(array.dtype for _, array in leaves if array.ndim > 1)
        return _Written(FORMATS[dtype], _dequantized(self._folder), digest)

    def _write_gguf(self, draft: Path, quantization: Quantization) -> _Written:
        model, tokenizer, _ = self._fuse(dequantize=True, dtype=mx.float32)
        name = f"{self._folder.name}-{self._source.adapter.digest()[:12]}"
        write_gguf(draft, model, tokenizer, quantization, name)
        vocabulary = Vocabulary.of_tokenizer(tokenizer, int(find_family(model).args.vocab_size))
        return _Written(quantization, _dequantized(self._folder), vocabulary.digest())

    def _read(self, draft: Path, written: _Written, reference: Reference) -> Reading:
        """What a fresh process reads of the artefact alone."""
        dtype = model_compute_dtype(self._source.config)
        compute = "float32" if dtype == mx.float32 else None
        trusts = self._source.model.trust_remote_code
        if draft.is_dir():
            return read_in_fresh_process(
                draft, "mlx_lm", reference, dtype=compute, trust_remote_code=trusts
            )
        if has_llama_cpp():
            return read_in_fresh_process(draft, "llama.cpp", reference, dtype=None)
        self._notes.append(NOT_RUN)
        with tempfile.TemporaryDirectory(prefix="nested-tune-") as folder:
            unpacked = unpack_gguf(draft, Path(folder, "model"))
            reading = read_in_fresh_process(unpacked, "mlx_lm", reference, dtype=compute)
        return replace(reading, tokenizer=read_vocabulary(draft).digest())

    def _judge(
        self, draft: Path, written: _Written, reference: Reference, reading: Reading
    ) -> ExportRecord:
        template = read_chat_template(reference.tokenizer)
        findings = judge_reading(
            reference,
            reading,
            weights=written.weights,
            quantized_base=written.quantized_base,
            tokenizer=written.tokenizer,
            chat_template=template,
        )
        files = sorted(path for path in draft.rglob("*") if path.is_file()) or [draft]
        return ExportRecord(
            artefact="folder" if draft.is_dir() else "gguf",
            weights=written.weights,
            quantized_base=written.quantized_base,
            files={
                path.relative_to(draft.parent if path == draft else draft).as_posix(): (
                    regular_sha256(path)
                )
                for path in files
            },
            source=self._source.model.name,
            version=self._source.adapter.digest(),
            base=self._source.model.model,
            base_fingerprint=fingerprint_base_model(self._folder),
            tokenizer=written.tokenizer,
            chat_template=None if template is None else digest_template(template),
            reader=reading.reader,
            texts=len(reference.texts),
            logits=findings.logits,
            gain=findings.gain,
            suites=findings.suites,
            notes=tuple(self._notes),
            problems=findings.problems,
            step=self._source.step,
            trained_on=self._source.model.seen.to_json(),
            prompt_format=self._source.model.prompt_format,
            packages={name: installed_version(name) for name in RECORDED_PACKAGES},
        )


def _dequantized(base: Path) -> Quantized | None:
    """The word for weights written in full whose base is quantized; None for any other base."""
    return "dequantized" if {*QUANTIZATION_KEYS} & read_model_config(base).keys() else None


def _publish(draft: Path, target: Path, *, is_rejected: bool) -> Path:
    """Put a folder, or a file after its record and card, in its place; all is synced.

    The place is `target`, or NAME.rejected of what does not stand. Where something lies there that
    is no earlier export that did not stand, NAME-2, NAME-3 and so on are tried. Returns the place.
    """
    is_folder = draft.is_dir()
    beside = [] if is_folder else [record_place(draft), card_place(draft)]
    for path in (*draft.rglob("*"), *beside, draft):
        sync_path(path)
    name, ending = (target.name, "") if is_folder else (target.stem, target.suffix)
    name += f".{REJECTED}" if is_rejected else ""
    names = (
        f"{name}{'' if number == 1 else f'-{number}'}{ending}" for number in itertools.count(1)
    )
    for place in map(target.with_name, names):
        taken = _list_taken(place, is_folder=is_folder)
        if not taken or (is_rejected and _may_be_replaced(place, taken)):
            break
    if taken and is_folder:
        shutil.rmtree(place)
    for path, place_of in zip(beside, (record_place, card_place), strict=False):
        path.replace(place_of(place))
    draft.replace(place)  # of an empty folder it takes the place, of another it fails
    sync_path(place.parent)
    return place


def _list_taken(place: Path, *, is_folder: bool) -> list[Path]:
    """What lies where an export to this place would be written; an empty folder is free."""
    if not is_folder:
        paths = (place, record_place(place), card_place(place))
        return [path for path in paths if os.path.lexists(path)]
    is_empty = file_type(place) == "directory" and not any(place.iterdir())
    return [] if is_empty or not os.path.lexists(place) else [place]


def _may_be_replaced(place: Path, taken: Sequence[Path]) -> bool:
    """Whether all of it is an earlier export that did not stand, as its record has it."""
    try:
        record = read_export_record(place)
        if record is None or record.stands:
            return False
        folder = place if place.is_dir() else place.parent
        written_beside = (record_place(place), card_place(place))
        hashes = {*record.files.values()}

        def is_exported(name: str) -> bool:
            """Whether a file is one of the export's, and as it was written."""
            return folder / name in written_beside or regular_sha256(folder / name) in hashes

        return all(find_reason_to_keep(path, is_exported) is None for path in taken)
    except (DamagedError, OSError):
        return False
