"""A base with its adapter as a model of its own, kept only where it answers as the adapter did.

It is written beside its place, read by a fresh process alone, judged, and put in its place; one
that does not stand is put under another name, for a look.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from nested_core import seams
from nested_core.backend import RECORDED_PACKAGES
from nested_core.config.loading import parse_config, parse_tasks
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import TaskSection
from nested_core.data.dataset_loading import load_run_data
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.errors import ConfigError, DatasetError, GateRejected, shorten
from nested_core.gate.tensors.base_compatibility import fingerprint_reasons
from nested_core.measure.answers.suite_answers import encode_suites, read_suites
from nested_core.measure.losses.held_out_loss import read_held_out_examples
from nested_core.models.base_model import (
    TrainedTokenizer,
    find_model_folder,
    fingerprint_base_model,
    model_compute_dtype,
    read_model_config,
)
from nested_core.pipeline.named_models import NamedModel, find_model, read_training_config
from nested_core.records.result import read_result
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry.versions import PROVENANCE_NAME
from nested_core.rooms.export.asked import (
    MAX_TEXT_ROWS,
    Asked,
    HeldOutRows,
    has_llama_cpp,
    read_base_and_adapter,
    read_in_fresh_process,
)
from nested_core.rooms.export.export_record import (
    FEW_BITS,
    ExportRecord,
    Quantization,
    Quantized,
    WeightFormat,
    record_place,
    write_export_record,
)
from nested_core.rooms.export.fusing import QUANTIZATION_KEYS, load_fused, write_model_folder
from nested_core.rooms.export.gguf.families import find_architecture
from nested_core.rooms.export.gguf.gguf_file import (
    digest_vocabulary,
    read_file_type,
    unpack_gguf,
    write_gguf,
    write_gguf_adapter,
)
from nested_core.rooms.export.judgement import judge_reading
from nested_core.rooms.export.served_as import SERVER, Program, has_server, place_for, try_programs
from nested_core.storage.adapter import Adapter
from nested_core.storage.atomic import TEMPORARY_PREFIX, sync_path
from nested_core.storage.checkpoint_verification import checkpoint_step
from nested_core.storage.manifest import MANIFEST_NAME, verify_manifest
from nested_core.storage.output_places import (
    require_absent_or_empty,
    require_output_file,
    resolve_path,
)
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import file_type, regular_sha256

NOT_RUN = "tensors and metadata checked, not run in llama.cpp"
REJECTED = "rejected"
OnStage = Callable[[str], None]


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    path: the folder or file.
    record: what was measured of it, as export.json has it.
    """

    path: Path
    record: ExportRecord

    @property
    def upload_command(self) -> str:
        """The command that would publish it; nothing is published here."""
        return f"hf upload USER/NAME {shlex.quote(str(self.path))}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `export --json` prints them."""
        return {"path": str(self.path)} | self.record.to_json()


@dataclass(frozen=True)
class _Source:
    """An adapter to export, with what is known of its training.

    base: the folder of its base.
    config: what it was trained with; of an adapter without a record, as it is by default.
    notes: what a person should know of it and of the measurement; more are added to it.
    """

    model: NamedModel
    adapter: Adapter
    base: Path
    config: FineTuneConfig
    is_config_known: bool
    step: int | None
    notes: list[str]


def export(
    what: str | Path,
    *,
    fused: str | Path | None = None,
    gguf: str | Path | None = None,
    gguf_adapter: str | Path | None = None,
    base_gguf: str | Path | None = None,
    programs: Sequence[Program] = (),
    quantize: Quantization = "f16",
    dequantize: bool = False,
    suites: Sequence[str | Path | Mapping[str, Any] | TaskSection] = (),
    data: str | Path | None = None,
    registry: Path | None = None,
    base_model: str | None = None,
    on_stage: OnStage | None = None,
) -> Export:
    """Write a base with its adapter as one model; keep it only if it behaves as base and adapter.

    A new process reads the model; its logits, losses and answers are compared with theirs.

    Args:
        what: an adapter of mlx_lm or PEFT, a run, NAME, NAME@VERSION or REGISTRY/NAME.
        fused: the new folder of a model that mlx_lm loads.
        gguf: the new file that llama.cpp reads.
        gguf_adapter: the new file of the LoRA alone. One of these three is given.
        base_gguf: the base that it is applied to; a missing one is made there.
        programs: of "ollama", "llama-server" and "lmstudio": what these read is written beside the
            GGUF, and llama-server is asked, if PATH has it.
        quantize: the format of a GGUF's matrices, below 8 bits by llama.cpp's own code.
        dequantize: leave the weights of a quantized base dequantized, as they always are in a GGUF.
        suites: questions that are asked; by default those of the run's gate.tasks. A file that they
            do not score is scored by `contains`.
        data: held-out examples by which the kept gain is measured; the run's own by default.
        registry: where a NAME is looked for; `registry` by default.
        base_model: the base of an adapter that names none, or another place of it.
        on_stage: called with the next thing that is done, in a few words.

    Raises GateRejected if the model does not behave so; it is then kept under another name, for a
    look. Raises ConfigError for an unknown name, a path that exists, and a family or tokenizer that
    has no GGUF; DamagedError for damaged files.
    """
    places = {"--fused": fused, "--gguf": gguf, "--gguf-adapter": gguf_adapter}
    base = None if base_gguf is None else resolve_path(base_gguf)
    programs = tuple(dict.fromkeys(programs))
    target = _require_place(places, quantize, programs, base)
    if base is not None and base.exists():
        quantize = read_file_type(base)
    begin = on_stage or (lambda stage: None)
    with tempfile.TemporaryDirectory(prefix="nested-tune-") as temporary, ExitStack() as context:
        found, run = find_model(str(what), registry, base_model, Path(temporary))
        source = _read_source(found, run, suites, data, is_gguf=fused is None)
        load = partial(
            load_fused,
            source.base,
            dequantize=dequantize or fused is None,
            dtype=mx.float32 if fused is None else None,
            trust_remote_code=source.model.trust_remote_code,
        )
        model, tokenizer, config = load(None if gguf_adapter else source.adapter)
        digest = digest_vocabulary(model, tokenizer) if fused is None else None
        asked = _choose_questions(source, tokenizer, data, programs)
        begin("fusing and writing")
        if seams.is_there("minutes"):
            from nested_core.rooms.minutes.blas_threads import using_quicker_blas_threads

            context.enter_context(using_quicker_blas_threads(model))
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = context.enter_context(
            tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=target.parent)
        )
        name = f"{source.base.name}-{source.adapter.digest()[:12]}"  # that programs show
        draft, weights = Path(folder, target.name), cast(WeightFormat, quantize)
        if fused is not None:
            weights = write_model_folder(draft, source.base, model, config)
        elif gguf is not None:
            write_gguf(draft, model, tokenizer, quantize, name)
        else:
            write_gguf_adapter(draft, model, source.adapter, name)
            source.notes.append(f"asked on its base as a GGUF in {quantize}")
        if (gguf_adapter or weights in FEW_BITS) and (base is None or not base.exists()):
            made = draft.with_name(f"{draft.name}.base")
            if gguf_adapter is None:  # the model has the adapter
                del model
                model = load(None)[0]
            write_gguf(made, model, tokenizer, quantize, source.base.name)
            if base is not None:
                base.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(made, base)
            base = base or made
        del model
        mx.clear_cache()
        if base is not None and base.parent == resolve_path(target.parent):
            draft.with_name(base.name).symlink_to(base)  # where the command for both finds it
        begin("reading base, adapter and what was written in new processes")
        lora_base, stored = base if gguf_adapter else None, base if weights in FEW_BITS else None
        record = _judge(
            draft, weights, digest, source, asked, programs=programs, base=lora_base, stored=stored
        )
        write_export_record(draft, record)
        place = publish(draft, target, programs, is_rejected=not record.stands)
    _require_kept(target, place, record)
    return Export(target, record)


def _require_place(
    places: Mapping[str, str | Path | None],
    quantize: Quantization,
    programs: Sequence[Program],
    base: Path | None,
) -> Path:
    """Return the one place that is given; ConfigError if nothing can, or may, be written there.

    places: by the flag that names it.
    """
    given = [(flag, place) for flag, place in places.items() if place is not None]
    if len(given) != 1:
        raise ConfigError("export: give one of --fused DIR, --gguf FILE and --gguf-adapter FILE.")
    ((flag, place),) = given
    target = Path(os.path.expanduser(place))
    is_folder, is_lora = flag == "--fused", flag == "--gguf-adapter"
    if is_folder:
        require_absent_or_empty(target, flag=flag)
    else:
        require_output_file(target, flag)
        if existing := _list_taken(target, programs, is_folder=False):
            raise ConfigError(f"{existing[0]} exists already. Nothing is written over.")
    written = [*filter(None, [base]), *_list_files(target, programs, is_folder=is_folder)]
    needs_llama_cpp = is_lora or (quantize in FEW_BITS and not is_folder)
    problems = (
        (is_folder and quantize != "f16", f"--quantize {quantize} is of a GGUF, not of --fused."),
        (is_folder and programs, "--for is of a GGUF, not of --fused."),
        (
            programs and not f"{target.name}{base or ''}".isprintable(),
            "a file's name has a control character, which programs would read as a line's end.",
        ),
        (
            needs_llama_cpp and not has_llama_cpp(),
            f"{flag if is_lora else f'--quantize {quantize}'} needs llama.cpp's own code, which is "
            f"not here. Install it (pip install llama-cpp-python compiles it), or give --gguf with "
            f"--quantize f16 or q8_0.",
        ),
        (
            is_lora and "lmstudio" in programs,
            "LM Studio takes no LoRA. Give --gguf for base and adapter as one model.",
        ),
        (base is not None and not is_lora, "--base-gguf is what --gguf-adapter is applied to."),
        (
            is_lora and programs and base is None,
            "a program applies a LoRA to its base as a GGUF. Give that by --base-gguf FILE; it is "
            "made there if there is none.",
        ),
        (
            any(file.name.startswith("-") or str(file).startswith("-") for file in written),
            "programs take a name that begins with - for a flag. Give another name.",
        ),
        (
            len({str(resolve_path(file)).casefold() for file in written}) < len(written),
            f"two of the files {', '.join(file.name for file in written)} would be one. Give "
            f"each GGUF a name of its own that ends in .gguf.",
        ),
    )
    for is_there, problem in problems:
        if is_there:
            raise ConfigError(f"export: {problem}")
    if base is not None and not base.exists():
        require_output_file(base, "--base-gguf")
    return target


def _require_kept(target: Path, place: Path, record: ExportRecord) -> None:
    """Raise GateRejected for an export that does not stand, ConfigError for one beside its place.

    place: where it lies.
    """
    if record.stands and place == target:
        return
    if record.stands:
        raise ConfigError(
            f"{target} appeared while the export was measured, and nothing is written over. The "
            f"export passed ({record.describe()}) and lies at {place}: move it where it belongs."
        )
    problems = "".join(f"\n  {told}" for told in (*record.problems, *record.notes))
    again = "\nWith --dequantize its weights stay as they were fused."
    raise GateRejected(
        f"{target} was not kept: {record.describe()}.{problems}\nIt lies at {place} for a "
        f"look.{again if record.quantized_base == 'kept' else ''}"
    )


def _read_source(
    model: NamedModel,
    run: RunDirectory | None,
    suites: Sequence[str | Path | Mapping[str, Any] | TaskSection],
    data: str | Path | None,
    *,
    is_gguf: bool,
) -> _Source:
    """Read the base and the configuration of the adapter that a person named, or of its run.

    The files of the base and of a version are hashed again, and compared with their records.

    suites, data: questions and held-out rows in place of those of the configuration.
    is_gguf: whether a GGUF is to be made of it.

    Raises ConfigError for a base without an adapter, for a base other than the adapter was trained
    on, and for one whose family is not written as GGUF, before anything is hashed.
    """
    adapter = model.adapter
    if adapter is None:
        raise ConfigError(f"{model.name} is a base without an adapter: there is nothing to export.")
    folder, base = Path(os.path.realpath(adapter.path)), find_model_folder(model.model)
    if is_gguf:
        find_architecture(str(read_model_config(base).get("model_type")))
    if (folder / MANIFEST_NAME).exists():
        verify_manifest(folder)
    config = read_training_config(folder, run)
    is_known = config is not None
    recorded = folder / PROVENANCE_NAME if run is None else run.dataset
    TrainedTokenizer.read(recorded).require_in(base, model.name)
    fingerprint_base_model(base, max_age=0)
    if reasons := fingerprint_reasons(adapter.config, base):
        raise ConfigError(f"{model.name}: {reasons[0].message}.")
    if config is None:
        config = parse_config({"model": model.model, "num_layers": -1}, source="the adapter")
    tasks = parse_tasks(suites, config.gate.tasks) or config.gate.tasks
    step, notes = _describe_origin(folder, run)
    if sampled := [task.name for task in tasks if task.temperature > 0]:
        notes.append(f"not asked, as answers are drawn: {', '.join(sampled)}")
    changes: dict[str, Any] = {"tasks": tuple(task for task in tasks if task.name not in sampled)}
    if data is not None:
        changes["held_out"] = str(data)
    gate = config.gate.model_copy(update=changes)
    config = config.model_copy(update={"model": model.model, "gate": gate})
    return _Source(model, adapter, base, config, is_known, step, notes)


def _describe_origin(folder: Path, run: RunDirectory | None) -> tuple[int | None, list[str]]:
    """Return the optimizer step of an adapter, and in a sentence what the gate said of it.

    There is neither for an adapter's folder without a run or a verdict.
    """
    gate = folder / GATE_NAME if run is None else run.gate
    verdict = read_verdict(gate) if gate.is_file() else None
    if run is None:
        step = None if verdict is None else verdict.adapter_step
        return step, [] if step is None else [f"step {step}, which passed the gate"]
    is_trained = run.result.is_file()
    step = read_result(run.result).adapter_step if is_trained else checkpoint_step(folder)
    if verdict is None:
        ended = "" if is_trained else " that was stopped, or trains still"
        return step, [f"step {step} of a run{ended}: it was not judged by the gate"]
    result = "passed the gate" if verdict.has_passed else f"the gate rejected: {verdict.summary()}"
    return step, [f"step {step} of a run, which {result}"]


def _choose_questions(
    source: _Source, tokenizer: Any, data: str | Path | None, programs: Sequence[Program]
) -> Asked:
    """Choose the questions for base, adapter and export: the run's rows and suites, or `data`'s.

    If no rows can be read, the reason is added to the source's notes. Raises ConfigError or
    DatasetError for rows of `data` that cannot be read.
    """
    config = source.config
    asked_as = source.model.prompt_format
    suites = encode_suites(read_suites(config.gate), tokenizer, source.base, asked_as)
    rows = held_out = None
    splits: dict[str, TokenizedSplit] = {}
    try:
        if source.is_config_known and data is None:
            splits = {name: each for name, each in load_run_data(config)[1].items() if len(each)}
        if source.is_config_known or data is not None:
            held_out = read_held_out_examples(config, splits)
        else:
            source.notes.append("the kept gain was not measured: --data FILE names held-out rows")
        rows = None if held_out is None else HeldOutRows.choose(held_out, config)
    except (ConfigError, DatasetError, OSError) as error:
        if data is not None:
            raise
        source.notes.append(
            f"the kept gain was not measured, as the run's data cannot be read: "
            f"{shorten(error, 200)}; --data FILE names other held-out rows"
        )
    splits |= {} if splits or held_out is None else {"held-out": held_out.split}
    step = 1 + sum(map(len, splits.values())) // MAX_TEXT_ROWS
    texts = [
        split.example(row).tolist()
        for split in splits.values()
        for row in range(0, len(split), step)
    ]
    asked = Asked(
        source.base,
        tokenizer,
        suites=suites,
        prompt_format=source.model.prompt_format,
        dtype="float32" if model_compute_dtype(config) == mx.float32 else None,
        trusts_remote_code=source.model.trust_remote_code,
    )
    return asked.about_rows(rows, texts, continues=SERVER in programs and has_server())


def _judge(
    draft: Path,
    weights: WeightFormat,
    digest: str | None,
    source: _Source,
    asked: Asked,
    *,
    programs: Sequence[Program],
    base: Path | None,
    stored: Path | None,
) -> ExportRecord:
    """Read base, adapter and exported model in new processes, and return how they compare.

    In a format of few bits the base is read too: what the bits cost is told apart from what the
    file lost of the adapter.

    draft: the exported folder or GGUF.
    digest: the SHA-256 that its tokenizer must have; None is that of the adapter's.
    programs: that serve it.
    base: the GGUF that it is applied to; None if it is a whole model.
    stored: the base as a GGUF of few bits; None in another format.
    """
    compared = read_base_and_adapter(asked, source.adapter)
    if base is not None:
        reading = read_in_fresh_process(base, asked, draft)
    elif draft.is_dir() or has_llama_cpp():
        reading = read_in_fresh_process(draft, asked)
    else:
        source.notes.append(NOT_RUN)
        unpacked = draft.with_name(f"{TEMPORARY_PREFIX}unpacked")
        found = unpack_gguf(draft, unpacked)
        reading = replace(read_in_fresh_process(unpacked, asked), tokenizer=found)
    quantized_base: Quantized | None = None
    if {*QUANTIZATION_KEYS} & read_model_config(source.base).keys():
        quantized_base = "kept" if weights == "quantized" else "dequantized"
    stored_base = None
    if stored is not None:
        losses_alone = replace(asked, suites=(), texts=(), continued=())
        stored_base = read_in_fresh_process(stored, losses_alone)
    digest = digest or compared[1].tokenizer
    findings = judge_reading(
        asked, (*compared, reading), weights=weights, tokenizer=digest, stored_base=stored_base
    )
    template = compared[1].chat_template
    files = sorted(path for path in draft.rglob("*") if path.is_file()) or [draft]
    folder = draft if draft.is_dir() else draft.parent
    digests = {path.relative_to(folder).as_posix(): regular_sha256(path) for path in files}
    read = digests
    if base is not None and programs:
        is_near = draft.with_name(base.name).is_symlink()
        read = {base.name if is_near else str(base): regular_sha256(base)} | digests
    served, problems = try_programs(programs, read, draft, asked, (compared[1], reading))
    return ExportRecord(
        artefact="folder" if draft.is_dir() else "gguf",
        weights=weights,
        quantized_base=quantized_base,
        files=digests,
        source=source.model.name,
        version=source.adapter.digest(),
        base=source.model.model,
        base_fingerprint=fingerprint_base_model(source.base),
        tokenizer=digest,
        chat_template=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        reader=reading.reader,
        texts=len(asked.texts),
        **vars(findings)
        | {"notes": (*source.notes, *findings.notes), "problems": (*findings.problems, *problems)},
        served=served,
        step=source.step,
        trained_on=source.model.seen.to_json(),
        prompt_format=source.model.prompt_format,
        packages={name: installed_version(name) for name in RECORDED_PACKAGES},
    )


def publish(
    draft: Path, target: Path, programs: Sequence[Program] = (), *, is_rejected: bool
) -> Path:
    """Move an exported folder, or a GGUF and its record, to its final path; return that path.

    The path is `target`, or NAME.rejected for a rejected model. If it exists, NAME-2, NAME-3 and so
    on are tried. Everything is synced to the disk.

    programs: whose files lie beside it, and name it as `target` does; under another name they are
        left out.
    """
    is_folder = draft.is_dir()
    name, ending = (target.name, "") if is_folder else (target.stem, target.suffix)
    name += f".{REJECTED}" if is_rejected else ""
    numbers = ("", *(f"-{number}" for number in range(2, 1_000)))
    places = (target.with_name(f"{name}{number}{ending}") for number in numbers)
    place = next(one for one in places if not _list_taken(one, programs, is_folder=is_folder))
    kept = programs if place == target else ()
    moved, to = (_list_files(one, kept, is_folder=is_folder) for one in (draft, place))
    for path in (*draft.rglob("*"), *moved):
        sync_path(path)
    for old, new in zip(moved, to, strict=True):
        old.replace(new)  # replaces an empty folder, and fails on another one
    sync_path(place.parent)
    return place


def _list_files(place: Path, programs: Sequence[Program], *, is_folder: bool) -> list[Path]:
    """List what an export to a place writes there and beside it; the place is the last."""
    if is_folder:
        return [place]
    return [*(place_for(one, place) for one in programs), record_place(place), place]


def _list_taken(place: Path, programs: Sequence[Program], *, is_folder: bool) -> list[Path]:
    """List what lies where an export to this place would be written; an empty folder is free."""
    if is_folder and file_type(place) == "directory" and not any(place.iterdir()):
        return []
    return [*filter(os.path.lexists, _list_files(place, programs, is_folder=is_folder))]
