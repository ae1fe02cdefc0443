"""Files and flags of mlx_lm.lora through both programs: read alike, and the same files left.

The variants are in tests/mlx_lm_variants.py. mlx_lm.lora runs on all of them in one process; ours
trains them in this one. `make reliability` runs each through the whole command too, and compares
every snapshot under `training.reference`, bit for bit.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import inspect
import json
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import mlx.core as mx
import pytest
import yaml
from mlx.utils import tree_flatten
from mlx_lm import lora
from mlx_lm.tuner import datasets as mlx_lm_datasets
from mlx_lm.tuner import utils as mlx_lm_tuner
from mlx_lm.utils import load_model

from flows import cli
from flows.commands.config_flags import load_config_from_flags
from nested_core import seams
from nested_core.config.key_properties import iterate_keys
from nested_core.config.schema import FineTuneConfig
from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME
from nested_core.storage.output_places import TRAINING_EXAMPLES_NAME
from nested_core.storage.safetensors_files import load_arrays, read_tensors
from tests.example import Finished, prepare, train
from tests.flows.conftest import called
from tests.fork_server import python
from tests.mlx_lm_runs import Job, Request
from tests.mlx_lm_stand_ins import make_stand_ins
from tests.mlx_lm_variants import EXAMPLES, FLAGS, KEYS, REFUSED, TRAINED, Variant, flag_variants

ROOT = Path(__file__).parents[2]
# One of each kind of file and tensor, in half a second; `make reliability` trains all of them.
TRAINED_HERE = tuple(
    variant
    for variant in EXAMPLES + TRAINED
    if variant.name
    in {
        *("lora_config.yaml", "lora_config.yaml, wandb", "dora", "full", "embeddings"),
        *("from an adapter", "trust_remote_code", "accumulation, remainder", "no snapshot"),
    }
)
FLAG_VARIANTS = flag_variants()
HELP = {"-h", "--help"}


def named(variants: tuple[Variant, ...], slow: tuple[Variant, ...] = ()) -> Any:
    """Parameters of a test, a variant each; those that need a module are skipped without it."""
    trains = pytest.mark.slow("trains in both programs")
    return [
        pytest.param(
            variant,
            id=variant.name,
            marks=[
                pytest.mark.skipif(not is_installed(variant), reason=f"no {variant.needs}"),
                *([trains] if variant in slow else []),
            ],
        )
        for variant in variants
    ]


def is_installed(variant: Variant) -> bool:
    return not variant.needs or importlib.util.find_spec(variant.needs) is not None


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """Where each `$name` is; the stand-in for wandb can be imported."""
    folder = tmp_path_factory.mktemp("stand-ins")
    paths = make_stand_ins(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(paths["modules"])
        patch.setenv("HF_DATASETS_CACHE", paths["cache"])
        yield paths
        sys.modules.pop("wandb", None)  # the stand-in


@dataclass(frozen=True)
class Theirs:
    """What mlx_lm.lora read and wrote, and the error that it ended with."""

    folder: Path
    values: dict[str, Any] | None
    error: str | None


def write_command(variant: Variant, folder: Path, stand_ins: Mapping[str, str]) -> list[str]:
    """Make a folder to run a variant in, with its lora.yaml; return its command line."""
    folder.mkdir(parents=True)
    text = Template(variant.file()).substitute(stand_ins)
    (folder / "lora.yaml").write_text(text, encoding="utf-8")
    words = [Template(word).substitute(stand_ins) for word in variant.flags]
    return words if words[:1] in (["-c"], ["--config"]) else ["-c", "lora.yaml", *words]


def run_mlx_lm(
    variants: Mapping[Variant, bool],
    folder: Path,
    stand_ins: Mapping[str, str],
    *,
    compiles: bool = False,
) -> dict[str, Theirs]:
    """Have mlx_lm.lora read each variant, and train those that are True."""
    jobs: list[Job] = [
        {
            "folder": str(folder / str(place)),
            "words": write_command(variant, folder / str(place), stand_ins),
            "trains": trains,
        }
        for place, (variant, trains) in enumerate(variants.items())
    ]
    request: Request = {"jobs": jobs, "modules": stand_ins["modules"], "compiles": compiles}
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    program = ROOT / "tests" / "mlx_lm_runs.py"
    done = python(program, folder / "request.json", folder / "results.json", timeout=500)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "results.json").read_bytes())
    return {
        variant.name: Theirs(Path(job["folder"]), **result)
        for variant, job, result in zip(variants, jobs, results, strict=True)
    }


@pytest.fixture(scope="module")
def theirs(request, stand_ins, tmp_path_factory) -> dict[str, Theirs]:
    """Every variant and flag read; those that are compared or fail there are trained.

    Compared are those of TRAINED_HERE, of which `make test` runs the first.
    """
    own = [item for item in request.session.items if item.path == request.path]
    runs_slow = any(item.get_closest_marker("slow") for item in own)
    compared = TRAINED_HERE if runs_slow else TRAINED_HERE[:1]
    variants = {v: v in compared or bool(v.there) for v in EXAMPLES + TRAINED}
    variants |= {variant: bool(variant.there) for variant in REFUSED}
    variants |= dict.fromkeys(FLAG_VARIANTS, False)
    return run_mlx_lm(variants, tmp_path_factory.mktemp("theirs"), stand_ins)


@pytest.fixture(scope="module")
def theirs_compiled(stand_ins, tmp_path_factory) -> dict[str, Theirs]:
    """Every variant and every flag trained as in a run of mlx_lm.lora, to the bit."""
    variants = (*EXAMPLES, *TRAINED, *FLAG_VARIANTS)
    trained = {variant: is_installed(variant) for variant in variants}
    return run_mlx_lm(trained, tmp_path_factory.mktemp("compiled"), stand_ins, compiles=True)


parser_of_commands = functools.cache(cli.build_parser)


def configured(words: list[str], folder: Path) -> FineTuneConfig:
    """What `nested-tune train` makes of its words and file."""
    with contextlib.chdir(folder):
        return load_config_from_flags(parser_of_commands().parse_args(["train", *words]))


def train_here(variant: Variant, folder: Path, stand_ins: Mapping[str, str]) -> Finished:
    """Train a variant, without what comes after training."""
    config = configured(write_command(variant, folder, stand_ins), folder)
    return train_config(config, folder)


def train_config(config: FineTuneConfig, folder: Path) -> Finished:
    with contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of few examples, and of few steps
        return train(config, prepare(config, folder / "run"))


# What mlx_lm has: every key and flag of its own is in the tables, and in a variant.


def keys_that_mlx_lm_reads() -> set[str]:
    """Its defaults, and what its code takes out of the configuration by name."""
    keys = set(lora.CONFIG_DEFAULTS) | {"hf_dataset"}
    keys |= _names_read_from("config", mlx_lm_datasets.create_dataset)
    keys |= {
        f"hf_dataset.{name}" for name in _names_read_from("config", mlx_lm_datasets.create_dataset)
    } - {"hf_dataset.mask_prompt"}  # which is the one of the top level
    keys |= {
        f"hf_dataset.{name}"
        for name in _names_read_from("ds", mlx_lm_datasets.load_custom_hf_dataset)
    } - {"hf_dataset.mask_prompt"}
    keys |= {
        f"lr_schedule.{name}"
        for name in _names_read_from("schedule_config", mlx_lm_tuner.build_schedule)
    }
    keys |= {
        f"lora_parameters.{name}"
        for name in _names_read_from("config", mlx_lm_tuner.linear_to_lora_layers)
    }
    return keys


def _names_read_from(variable: str, function: Callable[..., Any]) -> set[str]:
    """The names in `variable["name"]`, `variable.get("name")` and `getattr(variable, "name")`."""
    names = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        match node:
            case ast.Subscript(value=ast.Name(id=owner), slice=ast.Constant(value=str(name))):
                pass
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=owner), attr="get"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                pass
            case ast.Call(
                func=ast.Name(id="getattr"),
                args=[ast.Name(id=owner), ast.Constant(value=str(name)), *_],
            ):
                pass
            case _:
                continue
        if owner == variable:
            names.add(name)
    return names


def test_every_key_of_mlx_lm_has_its_line_in_the_docs() -> None:
    assert keys_that_mlx_lm_reads() == KEYS.keys()


def test_every_flag_of_mlx_lm_is_tried_alone() -> None:
    parser = lora.build_parser()
    assert {name for action in parser._actions for name in action.option_strings} - HELP == set(
        FLAGS
    )
    keys = {"--" + key.replace("_", "-") for key in KEYS}
    assert {flag for flag in FLAGS if flag.startswith("--")} <= keys


def keys_in(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted names in a file, of sections in lists too."""
    for key, value in values.items():
        yield prefix + key
        for section in value if isinstance(value, list) else [value]:
            if isinstance(section, dict):
                yield from keys_in(section, f"{prefix}{key}.")


def test_every_key_is_in_the_file_of_a_variant() -> None:
    used: set[str] = set()
    for variant in EXAMPLES + TRAINED:
        used |= set(keys_in(yaml.safe_load(variant.file())))
    assert KEYS.keys() - used == {"config"}  # which is the flag -c, and in a file refused
    assert len(EXAMPLES + TRAINED) >= 20


def test_every_key_of_the_docs_is_one_of_ours() -> None:
    ours = {key.name for key in iterate_keys(FineTuneConfig)}
    assert {key for key, (relation, _) in KEYS.items() if relation != "refused"} - ours == {
        "config"
    }


def test_a_key_that_mlx_lm_adds_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lora.CONFIG_DEFAULTS, "new_key", 1)
    with pytest.raises(AssertionError):
        test_every_key_of_mlx_lm_has_its_line_in_the_docs()


# What both read.


def agrees(ours: Any, theirs: Any) -> bool:
    """Whether ours holds theirs; keys that they leave out may have a default here."""
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and all(agrees(ours.get(key), theirs[key]) for key in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(agrees, ours, theirs))
    return bool(ours == theirs)


@pytest.mark.parametrize("variant", named((*EXAMPLES, *TRAINED, *FLAG_VARIANTS)))
def test_both_programs_read_the_same(variant, theirs, stand_ins, tmp_path) -> None:
    config = configured(write_command(variant, tmp_path / "ours", stand_ins), tmp_path / "ours")
    ours = config.model_dump(mode="json", by_alias=True)
    read = theirs[variant.name].values
    assert read is not None, theirs[variant.name].error
    read["train"] = True  # implied
    read["optimizer"] = read["optimizer"].lower()
    read["optimizer_config"] = {
        name: arguments for name, arguments in read["optimizer_config"].items() if arguments
    }
    if isinstance(read.get("hf_dataset"), dict):
        read["hf_dataset"] = [read["hf_dataset"]]
    if variant.relation == "better":
        own = yaml.safe_load(variant.yaml) or {}
        read = {key: value for key, value in read.items() if key not in own}
    different = {
        key: (ours[key], read[key])
        for key in read.keys() - {"config"}
        if not agrees(ours[key], read[key])
    }
    assert different == {}


# What both leave.


def snapshot_names(config: FineTuneConfig) -> set[str]:
    """What mlx_lm.lora leaves in adapter_path, by its rule: a snapshot each `save_every`."""
    every = config.intervals(config.iters).save
    assert every is not None
    numbers = range(every, config.iters + 1, every)
    return {WEIGHTS_NAME, CONFIG_NAME} | {f"{number:07d}_{WEIGHTS_NAME}" for number in numbers}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def require_same_files(variant: Variant, config: FineTuneConfig, ours: Path, run: Theirs) -> None:
    """Both left the same tensors by the same names, ours the record of its rows beside them.

    Or mlx_lm.lora failed as it does.
    """
    if variant.there:
        assert variant.there in str(run.error)
        return
    assert run.error is None
    their_adapters = run.folder / str(config.adapter_path)
    assert names_in(their_adapters) | {TRAINING_EXAMPLES_NAME} == names_in(ours)
    for path in ours.glob("*.safetensors"):
        assert shapes(path) == shapes(their_adapters / path.name), path.name


def shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in read_tensors(path).items()}


def require_loadable(config: FineTuneConfig, adapters: Path) -> None:
    """mlx_lm loads the adapter and each snapshot onto its base, and computes with them."""
    trusts = config.trust_remote_code
    model = load_model(Path(config.model), trust_remote_code=trusts)[0]
    mlx_lm_tuner.load_adapters(model, str(adapters))
    for path in adapters.glob("*.safetensors"):
        model.load_weights(str(path), strict=False)
        leaves: Any = tree_flatten(model.parameters())
        loaded = dict(leaves)
        for name, value in load_arrays(path).items():
            assert mx.array_equal(loaded[name], value), name
    assert mx.isfinite(model(mx.array([[5, 6, 7]]))).all()


@pytest.mark.parametrize("variant", named(TRAINED_HERE, slow=TRAINED_HERE))
def test_training_leaves_what_mlx_lm_leaves(variant, theirs, stand_ins, tmp_path) -> None:
    done = train_here(variant, tmp_path / "ours", stand_ins)
    assert done.config.adapter_path is not None
    adapters = tmp_path / "ours" / done.config.adapter_path
    assert names_in(adapters) == snapshot_names(done.config) | {TRAINING_EXAMPLES_NAME}
    require_same_files(variant, done.config, adapters, theirs[variant.name])
    require_loadable(done.config, adapters)


@pytest.mark.parametrize("variant", named(REFUSED))
def test_a_variant_is_refused_with_a_reason_before_it_trains(
    variant: Variant, theirs: dict[str, Theirs], stand_ins: Mapping[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "ours"
    ended = called("train", *write_command(variant, folder, stand_ins), cwd=folder)
    assert ended.code == variant.code, ended.stderr
    assert variant.here in " ".join(ended.message().split())
    assert not list(folder.rglob(WEIGHTS_NAME))
    assert variant.there in str(theirs[variant.name].error)


def run_command(variant: Variant, folder: Path, stand_ins: Mapping[str, str]) -> FineTuneConfig:
    """`nested-tune train`, to its end."""
    words = write_command(variant, folder, stand_ins)
    ended = called("train", *words, "--run-dir", "run", cwd=folder)
    assert ended.code == 0, ended.stderr
    config = configured(words, folder)
    adapters = folder / str(config.adapter_path)
    assert names_in(adapters) == snapshot_names(config) | {TRAINING_EXAMPLES_NAME}
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        assert (adapters / name).read_bytes() == (folder / "run" / "adapter" / name).read_bytes()
    return config


@pytest.mark.slow("trains by the command, and is judged")
def test_the_example_of_mlx_lm_trains_by_the_command_and_reports_to_its_service(
    theirs: dict[str, Theirs], stand_ins: Mapping[str, str], tmp_path: Path
) -> None:
    variant = next(variant for variant in EXAMPLES if "wandb" in variant.name)
    config = run_command(variant, tmp_path / "ours", stand_ins)
    run = theirs[variant.name]
    require_same_files(variant, config, tmp_path / "ours" / "adapters", run)
    assert reported(tmp_path / "ours") == reported(run.folder) == ({"capitals"}, {4})


def reported(folder: Path) -> tuple[set[str], set[int]]:
    """What the stand-in for wandb was told: projects, and the iterations of training losses."""
    lines = (folder / "wandb.jsonl").read_text(encoding="utf-8").splitlines()
    calls = [json.loads(line) for line in lines]
    projects = {call[1] for call in calls if call[0] == "init"}
    return projects, {call[1] for call in calls if call[0] == "log" and "train_loss" in call[2]}


@pytest.mark.reliability
@pytest.mark.parametrize("variant", named((*EXAMPLES, *TRAINED, *FLAG_VARIANTS)))
def test_the_command_leaves_what_mlx_lm_leaves(
    variant, theirs_compiled, stand_ins, tmp_path
) -> None:
    config = run_command(variant, tmp_path / "ours", stand_ins)
    adapters = tmp_path / "ours" / str(config.adapter_path)
    require_same_files(variant, config, adapters, theirs_compiled[variant.name])
    require_loadable(config, adapters)


REFERENCE = [
    pytest.param(variant, id=variant.name)
    for variant in (*EXAMPLES, *TRAINED, *FLAG_VARIANTS)
    if variant.relation == "same" and not variant.needs
]


@pytest.mark.reliability
@pytest.mark.skipif(not seams.is_there("reference"), reason="the room reference is not here")
@pytest.mark.parametrize("variant", REFERENCE)
def test_every_snapshot_of_a_reference_run_is_mlx_lms_to_the_bit(
    variant, theirs_compiled, stand_ins, tmp_path
) -> None:
    words = write_command(variant, tmp_path / "ours", stand_ins)
    config = configured([*words, "--training.reference", "mlx_lm"], tmp_path / "ours")
    train_config(config, tmp_path / "ours")
    adapters = tmp_path / "ours" / str(config.adapter_path)
    run = theirs_compiled[variant.name].folder / str(config.adapter_path)
    assert names_in(adapters) == names_in(run) | {TRAINING_EXAMPLES_NAME}
    for path in adapters.glob("*.safetensors"):
        assert read_tensors(path) == read_tensors(run / path.name), path.name
