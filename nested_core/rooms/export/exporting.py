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
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

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
from nested_core.rooms.export.asked import MAX_TEXT_ROWS, Asked, HeldOutRows
from nested_core.rooms.export.export_record import (
    CARD_NAME,
    FEW_BITS,
    ExportRecord,
    Quantization,
    Quantized,
    ServedBy,
    WeightFormat,
    record_place,
    render_export_card,
    write_export_record,
)
from nested_core.rooms.export.fresh_reading import (
    Reading,
    has_llama_cpp,
    read_base_and_adapter,
    read_in_fresh_process,
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
from nested_core.rooms.export.served_as import Program, Served, place_for, require_served
from nested_core.rooms.export.server_asked import SERVER, has_server, try_programs
from nested_core.storage.adapter import Adapter
from nested_core.storage.atomic import TEMPORARY_PREFIX, sync_path, write_bytes
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

    @property
    def gguf_name(self) -> str:
        """The name of base and adapter that programs show."""
        return f"{self.base.name}-{self.adapter.digest()[:12]}"


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
    target = _require_place(places, quantize, programs, base_gguf)
    begin = on_stage or (lambda stage: None)
    with tempfile.TemporaryDirectory(prefix="nested-tune-") as temporary, ExitStack() as threads:
        base = None
        if gguf_adapter is not None:
            base = Path(temporary, "base.gguf") if base_gguf is None else resolve_path(base_gguf)
            quantize = read_file_type(base) if base.exists() else quantize
        source = _read_source(
            str(what), registry, base_model, Path(temporary), suites, is_gguf=fused is None
        )
        model, tokenizer, config = load_fused(
            source.base,
            None if gguf_adapter else source.adapter,
            dequantize=dequantize or fused is None,
            dtype=mx.float32 if fused is None else None,
            trust_remote_code=source.model.trust_remote_code,
        )
        if fused is None:
            digest = digest_vocabulary(model, tokenizer)
        else:
            digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        asked = _choose_questions(source, tokenizer, data)
        if SERVER in programs and has_server():
            asked = replace(asked, continued=asked.list_beginnings())
        begin("fusing and writing")
        if seams.is_there("minutes"):
            from nested_core.rooms.minutes.blas_threads import using_quicker_blas_threads

            threads.enter_context(using_quicker_blas_threads(model))
        target.parent.mkdir(parents=True, exist_ok=True)
        draft_folder = threads.enter_context(
            tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=target.parent)
        )
        draft = Path(draft_folder, target.name)
        weights: WeightFormat = quantize
        if base is not None:
            _write_lora(draft, base, source, (model, tokenizer), quantize)
        elif fused is None:
            write_gguf(draft, model, tokenizer, quantize, source.gguf_name)
        else:
            write_model_folder(draft, source.base, model, config)
            weights = _find_weight_format(model, config)
        del model
        mx.clear_cache()
        begin("reading base, adapter and what was written in new processes")
        record = _judge(draft, weights, digest, source, asked, base=base, programs=programs)
        write_export_record(record_place(draft), record)
        if draft.is_dir():
            write_bytes(draft / CARD_NAME, render_export_card(draft.name, record).encode())
        place = publish(draft, target, programs, is_rejected=not record.stands)
    _require_kept(target, place, record)
    return Export(target, record)


def _require_place(
    places: Mapping[str, str | Path | None],
    quantize: Quantization,
    programs: Sequence[Program],
    base_gguf: str | Path | None,
) -> Path:
    """Return the one place that is given; ConfigError if nothing can, or may, be written there.

    places: by the flag that names it.
    """
    given = [(flag, place) for flag, place in places.items() if place is not None]
    if len(given) != 1:
        raise ConfigError("export: give one of --fused DIR, --gguf FILE and --gguf-adapter FILE.")
    ((flag, place),) = given
    target = Path(os.path.expanduser(place))
    if flag == "--fused":
        require_absent_or_empty(target, flag=flag)
        others = {f"--quantize {quantize}": quantize != "f16", "--for": programs}
        if wrong := [name for name, is_given in others.items() if is_given]:
            raise ConfigError(f"export: {wrong[0]} is of a GGUF, not of --fused.")
        return target
    require_output_file(target, flag)
    if existing := _list_taken(target, programs, is_folder=False):
        raise ConfigError(f"{existing[0]} exists already. Nothing is written over.")
    _require_llama_cpp(quantize, flag)
    is_adapter = flag == "--gguf-adapter"
    require_served(programs, is_adapter=is_adapter, has_base=base_gguf is not None)
    if base_gguf is not None:
        base = resolve_path(base_gguf)
        if not base.exists():
            require_output_file(base, "--base-gguf")
        if base == resolve_path(target):
            raise ConfigError("export: --base-gguf and --gguf-adapter are two files.")
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
    problems = "".join(f"\n  {problem}" for problem in record.problems)
    again = "\nWith --dequantize its weights stay as they were fused."
    raise GateRejected(
        f"{target} was not kept: {record.describe()}.{problems}\nIt lies at {place} for a "
        f"look.{again if record.quantized_base == 'kept' else ''}"
    )


def _write_lora(
    draft: Path, base: Path, source: _Source, loaded: tuple[Any, Any], weights: Quantization
) -> None:
    """Write a LoRA alone, and the base that it is applied to, unless that exists.

    loaded: model and tokenizer.
    """
    model, tokenizer = loaded
    write_gguf_adapter(draft, model, source.adapter, source.gguf_name)
    if not base.exists():
        made = draft.with_name(f"{draft.name}.base")
        write_gguf(made, model, tokenizer, weights, source.base.name)
        base.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, base)
    if base.parent == resolve_path(draft.parent.parent):
        draft.with_name(base.name).symlink_to(base)  # where the command that serves both finds it
    source.notes.append(f"asked on its base as a GGUF in {weights}")


def _require_llama_cpp(quantize: Quantization, flag: str) -> None:
    """Raise ConfigError where llama.cpp is needed for a file and is not here."""
    if has_llama_cpp() or (flag == "--gguf" and quantize not in FEW_BITS):
        return
    what = flag if flag == "--gguf-adapter" else f"--quantize {quantize}"
    raise ConfigError(
        f"export: {what} needs llama.cpp's own code, which is not here. Install it (pip install "
        f"llama-cpp-python compiles it), or give --gguf with --quantize f16 or q8_0."
    )


def _read_source(
    what: str,
    registry: Path | None,
    base_model: str | None,
    temporary: Path,
    suites: Sequence[str | Path | Mapping[str, Any] | TaskSection],
    *,
    is_gguf: bool,
) -> _Source:
    """Find and read the adapter that a person named, with its base and its configuration.

    The files of the base and of a version are hashed again, and compared with their records.

    what: an adapter's folder, a run or a name, as in `export`.
    temporary: a folder for an adapter that is converted from PEFT.
    suites: questions in place of those of the configuration.
    is_gguf: whether a GGUF is to be made of it.

    Raises ConfigError for an unknown name, for a base other than the adapter was trained on, and
    for one whose family is not written as GGUF, before anything is hashed.
    """
    model, run = find_model(what, registry, base_model, temporary)
    adapter = model.adapter
    if adapter is None:
        raise ConfigError(f"{what} is a base without an adapter: there is nothing to export.")
    folder, base = Path(os.path.realpath(adapter.path)), find_model_folder(model.model)
    if is_gguf:
        find_architecture(str(read_model_config(base).get("model_type")))
    if (folder / MANIFEST_NAME).exists():
        verify_manifest(folder)
    config = read_training_config(folder, run)
    is_known = config is not None
    recorded = folder / PROVENANCE_NAME if run is None else run.dataset
    TrainedTokenizer.read(recorded).require_in(base, what)
    fingerprint_base_model(base, max_age=0)
    if reasons := fingerprint_reasons(adapter.config, base):
        raise ConfigError(f"{what}: {reasons[0].message}.")
    if config is None:
        config = parse_config({"model": model.model, "num_layers": -1}, source="the adapter")
    tasks = parse_tasks(suites, config.gate.tasks) or config.gate.tasks
    step, note = _describe_origin(folder, run)
    notes = [] if note is None else [note]
    if sampled := [task.name for task in tasks if task.temperature > 0]:
        notes.append(f"not asked, as answers are drawn: {', '.join(sampled)}")
    tasks = tuple(task for task in tasks if task.name not in sampled)
    changes = {"model": model.model, "gate": config.gate.model_copy(update={"tasks": tasks})}
    config = config.model_copy(update=changes)
    return _Source(model, adapter, base, config, is_known, step, notes)


def _describe_origin(folder: Path, run: RunDirectory | None) -> tuple[int | None, str | None]:
    """Return the optimizer step of an adapter, and a sentence on what the gate said of it.

    Both are None for an adapter's folder without a run or a verdict.
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
    result = "passed the gate" if verdict.has_passed else f"the gate rejected: {verdict.summary()}"
    return step, f"step {step} of a run, which {result}"


def _choose_questions(source: _Source, tokenizer: Any, data: str | Path | None) -> Asked:
    """Choose the questions for base, adapter and export: the run's rows and suites, or `data`'s.

    If no rows can be read, the reason is added to the source's notes. Raises ConfigError or
    DatasetError for rows of `data` that cannot be read.
    """
    config = source.config
    suites = encode_suites(
        read_suites(config.gate), tokenizer, source.base, source.model.prompt_format
    )
    rows = held_out = None
    splits: dict[str, TokenizedSplit] = {}
    try:
        if data is not None:
            gate = config.gate.model_copy(update={"held_out": str(data)})
            held_out = read_held_out_examples(config.model_copy(update={"gate": gate}), {})
        elif source.is_config_known:
            _, loaded = load_run_data(config)
            splits = {name: split for name, split in loaded.items() if len(split)}
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
    return Asked.choose(source.base, tokenizer, rows, suites, texts)


def _find_weight_format(model: Any, config: Mapping[str, Any]) -> WeightFormat:
    """The format of the matrices of a folder that is written with this config.json."""
    if "quantization" in config:
        return "quantized"
    leaves: Any = tree_flatten(model.parameters())
    dtype = next(array.dtype for _, array in leaves if array.ndim > 1)
    return cast(WeightFormat, str(dtype).removeprefix("mlx.core."))


def _read_base_in(weights: Quantization, source: _Source, asked: Asked) -> Reading:
    """Store the base alone in a format, and return what llama.cpp reads of it."""
    with tempfile.TemporaryDirectory(prefix="nested-tune-") as folder:
        model, _, _ = load_fused(
            source.base,
            None,
            dequantize=True,
            dtype=mx.float32,
            trust_remote_code=source.model.trust_remote_code,
        )
        write_gguf(Path(folder, "base"), model, asked.tokenizer, weights, source.base.name)
        return read_in_fresh_process(Path(folder, "base"), asked, dtype=None)


def _judge(
    draft: Path,
    weights: WeightFormat,
    tokenizer_digest: str,
    source: _Source,
    asked: Asked,
    *,
    base: Path | None,
    programs: Sequence[Program],
) -> ExportRecord:
    """Read base, adapter and exported model in new processes, and return how they compare.

    In a format of few bits the base is read too: what the bits cost is told apart from what the
    file lost of the adapter.

    draft: the exported folder or GGUF.
    tokenizer_digest: the SHA-256 that its tokenizer must have.
    base: the GGUF that it is applied to; None if it is a whole model.
    programs: that serve it.
    """
    dtype = "float32" if model_compute_dtype(source.config) == mx.float32 else None
    trusts = source.model.trust_remote_code
    compared = read_base_and_adapter(
        asked, source.adapter.path, dtype=dtype, trust_remote_code=trusts
    )
    if base is not None:
        reading = read_in_fresh_process(base, asked, dtype=None, adapter=draft)
    elif draft.is_dir() or has_llama_cpp():
        reading = read_in_fresh_process(draft, asked, dtype=dtype, trust_remote_code=trusts)
    else:
        source.notes.append(NOT_RUN)
        with tempfile.TemporaryDirectory(prefix="nested-tune-") as unpacked:
            digest = unpack_gguf(draft, Path(unpacked))
            reading = read_in_fresh_process(Path(unpacked), asked, dtype=dtype)
        reading = replace(reading, tokenizer=digest)
    quantized_base: Quantized | None = None
    if {*QUANTIZATION_KEYS} & read_model_config(source.base).keys():
        quantized_base = "kept" if weights == "quantized" else "dequantized"
    stored_base, without_suites = None, replace(asked, suites=())
    if weights in FEW_BITS and base is not None:
        stored_base = read_in_fresh_process(base, without_suites, dtype=None)
    elif weights in FEW_BITS:
        stored_base = _read_base_in(cast(Quantization, weights), source, without_suites)
    findings = judge_reading(
        asked,
        (*compared, reading),
        weights=weights,
        tokenizer=tokenizer_digest,
        stored_base=stored_base,
    )
    template = compared[1].chat_template
    served, problems = tuple[ServedBy, ...](), tuple[str, ...]()
    if programs:
        read = (draft,) if base is None else (base, draft)
        is_near = [(draft.parent / path.name).resolve() == path.resolve() for path in read]
        names = [path.name if near else str(path) for path, near in zip(read, is_near, strict=True)]
        digests = dict(zip(names, map(regular_sha256, read), strict=True))
        told = Served(digests, asked.tokenizer, source.base, source.model.prompt_format)
        served, problems = try_programs(programs, told, draft, asked, (compared[1], reading))
    files = sorted(path for path in draft.rglob("*") if path.is_file()) or [draft]
    folder = draft if draft.is_dir() else draft.parent
    return ExportRecord(
        artefact="folder" if draft.is_dir() else "gguf",
        weights=weights,
        quantized_base=quantized_base,
        files={path.relative_to(folder).as_posix(): regular_sha256(path) for path in files},
        source=source.model.name,
        version=source.adapter.digest(),
        base=source.model.model,
        base_fingerprint=fingerprint_base_model(source.base),
        tokenizer=tokenizer_digest,
        chat_template=None if template is None else hashlib.sha256(template.encode()).hexdigest(),
        reader=reading.reader,
        texts=len(asked.texts),
        **vars(findings)
        | {
            "notes": (*source.notes, *findings.notes),
            "problems": (*findings.problems, *problems),
        },
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
    record = draft if is_folder else record_place(draft)
    for path in (*draft.rglob("*"), record, draft):
        sync_path(path)
    name, ending = (target.name, "") if is_folder else (target.stem, target.suffix)
    name += f".{REJECTED}" if is_rejected else ""
    numbers = ("", *(f"-{number}" for number in range(2, 1_000)))
    places = (target.with_name(f"{name}{number}{ending}") for number in numbers)
    place = next(one for one in places if not _list_taken(one, programs, is_folder=is_folder))
    if not is_folder:
        record.replace(record_place(place))
    for program in programs if place == target else ():
        place_for(program, draft).replace(place_for(program, place))
    draft.replace(place)  # replaces an empty folder, and fails on another one
    sync_path(place.parent)
    return place


def _list_taken(place: Path, programs: Sequence[Program] = (), *, is_folder: bool) -> list[Path]:
    """List what lies where an export to this place would be written; an empty folder is free."""
    if not is_folder:
        paths = (place, record_place(place), *(place_for(one, place) for one in programs))
        return [path for path in paths if os.path.lexists(path)]
    is_empty = file_type(place) == "directory" and not any(place.iterdir())
    return [] if is_empty or not os.path.lexists(place) else [place]
