"""Write docs/environment.md, the environment variables that the code names: `make docs`.

Every variable that is found in the code, the settings of deployments/ and the units needs a line
here, or in its room's ROOM.toml: below `[environment."SECTION"]`, NAME = [default, meaning]. With
`--check` (in `make check`) it writes nothing, and fails where one has none, or the page is old.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from docs.generated_page import write_or_check

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "environment.md"
HEAD = """\
# Environment variables

Written by `make docs`; do not edit it by hand. Nothing here has to be set to train. Defaults are in
brackets. On a server, `/etc/nested-tune/settings.env` is the place
([Nightly on Prefect](../deployments/README.md)).
"""
INTERNAL = "Between processes of the program: do not set"  # the page names them alone
# By section: what is there without it, and what it does.
VARIABLES = {
    "To set": {
        "NESTED_TUNE_CACHE": (
            "`~/.cache/nested-tune`",
            "folder for tokenised data, hashes, answers and compiled kernels",
        ),
        "NESTED_TUNE_KERNELS": (
            "`kernels` in the folder above",
            "folder for compiled kernels; refused if others can write there",
        ),
        "NESTED_TUNE_DEVICE_LOCK": (
            "the GPU's number",
            "name of the lock that one training at a time holds; `off` for none",
        ),
        "NESTED_TUNE_NO_OPENBLAS": ("", "`1`: do not load OpenBLAS on a Linux CPU"),
        "CUDA_VISIBLE_DEVICES": ("every GPU", "GPUs that a run uses, in order"),
        "XDG_CACHE_HOME": ("`~/.cache`", "where the folder for caches is made"),
        "XDG_RUNTIME_DIR": (
            "a private folder in the temporary one",
            "where locks of GPUs are kept",
        ),
        "COLUMNS": ("the terminal's width", "width of tables and help"),
        "HF_TOKEN": (
            "",
            "read by `huggingface_hub`, for models and data sets that need an account",
        ),
    },
    "On a server: workers, and whoever runs `nested-tune deploy`": {
        "NESTED_TUNE_HOME": (
            "the folder where `deploy` was run",
            "folder in which flows run; relative paths begin there",
        ),
        "NESTED_TUNE_ROOTS": (
            "the home alone",
            "folders that parameters and events may name, separated by colons",
        ),
        "NESTED_TUNE_TRUSTED_MODELS": ("none", "models whose own Python code a run may execute"),
        "NESTED_TUNE_BUCKETS": ("none", "addresses of object storage that a run may use, spaced"),
        "NESTED_TUNE_REGISTRIES": ("none", "registries in which a run may begin a new name"),
        "NESTED_TUNE_LOG_FORMAT": (
            "text",
            "`json`: flows and `serve` log a line of JSON a record; the default of `--log-format`",
        ),
        "NESTED_TUNE_PENDING_SECONDS": (
            "600",
            "read by `deploy`: alert if a run has not begun after so long",
        ),
        "NESTED_TUNE_LONG_RUN": (
            "2",
            "read by `reconcile`: alert if a run takes so many times the longest of the last five",
        ),
    },
    "Prefect's, where ours differ": {
        "PREFECT_API_URL": ("", "address of Prefect's server; without it a flow starts its own"),
        "PREFECT_HOME": ("`~/.prefect`", "Prefect's folder for profiles and results"),
        "DO_NOT_TRACK": ("1", "no telemetry"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": ("false", "no telemetry"),
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": (
            "json",
            "failed states are kept as JSON, not pickled",
        ),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": (
            "90",
            "how long a flow waits for a server of its own",
        ),
        "PREFECT_SERVER_API_HOST": ("", "address on which the server listens"),
        "PREFECT_SERVER_API_PORT": ("", "its port"),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": ("", "refuses forged forms"),
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ("", "web pages that may call the API"),
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": ("", "leases outlive the server"),
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": ("", "where the server copies the pages of its UI"),
        "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS": ("", "when a waiting run is Late"),
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": ("events", "what of the database is removed"),
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": (
            "P90D",
            "how long runs stay after they ended, with logs and pages",
        ),
        "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": ("P7D", "how long events stay"),
        "PREFECT_WORKER_QUERY_SECONDS": ("", "how often a worker asks for runs"),
        "PREFECT_CLIENT_RETRY_EXTRA_CODES": ("", "asked again while the database restarts"),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": ("", "seconds between a run's signs of life"),
    },
    "Set by the program; a value that is there already stays": {
        "MLX_USE_CUDA_GRAPHS": ("0", "on CUDA"),
        "MLX_CUDA_SDPA_CACHE_SIZE": ("8192", "on CUDA: plans of attention that MLX keeps"),
        "MLX_CUDA_SDPA_BACKWARD_CACHE_SIZE": ("256", "the same, of the backward pass"),
        "MLX_MAX_OPS_PER_BUFFER": ("8 to 100", "on CUDA: operations a commit, by model size"),
        "OPENBLAS_THREAD_TIMEOUT": ("18", "OpenBLAS's threads sleep after 0.1 ms"),
    },
    INTERNAL: {
        "NESTED_TUNE_TMPDIR": ("", "`TMPDIR` as it was before training replaced it"),
        "NESTED_TUNE_PARENT": ("", "process that begins a training again if it is killed"),
        "MLX_RANK": ("", "rank of a process that trains beside others"),
        "POLARS_MAX_THREADS": ("", "`1` in processes that read data"),
        "TOKENIZERS_PARALLELISM": ("", "`false` in processes that read data"),
        "PANDERA_VALIDATION_DEPTH": ("", "taken away while pandera is imported"),
    },
}
NOT_IN_CODE = {"HF_TOKEN"}  # a library reads it
for _file in sorted((ROOT / "nested_core" / "rooms").glob("*/ROOM.toml")):
    for _section, _of_room in (
        tomllib.loads(_file.read_text("utf-8")).get("environment", {}).items()
    ):
        VARIABLES[_section] |= {name: (default, text) for name, (default, text) in _of_room.items()}
_OURS = re.compile(
    r"(NESTED_TUNE|PREFECT|MLX|MLFLOW|OPENBLAS|POLARS|PANDERA|TOKENIZERS|XDG)(_[A-Z0-9]+)+"
)
_SETTING = re.compile(r"^(?:Environment=)?([A-Z][A-Z_]+)=(.*)$", re.MULTILINE)
_UNITS_OWN = {"PATH", "REGISTRY"}


def find_variables(root: Path = ROOT) -> dict[str, list[str]]:
    """The variables that a program or a service's file names, each with those files."""
    found: dict[str, set[str]] = defaultdict(set)
    for room in ("nested_core", "tasks", "flows"):
        for path in (root / room).rglob("*.py"):
            for name in _variables_of(ast.parse(path.read_text(encoding="utf-8"))):
                found[name].add(path.relative_to(root).as_posix())
    deployments = root / "deployments"
    for path in (deployments / "settings.env", *deployments.glob("systemd/**/*.service")):
        for name, _ in _SETTING.findall(path.read_text(encoding="utf-8")):
            found[name].add(path.relative_to(root).as_posix())
    return {name: sorted(files) for name, files in found.items() if name not in _UNITS_OWN}


def _variables_of(tree: ast.Module) -> Iterator[str]:
    """Names of known prefixes, and whatever os.environ is asked for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _OURS.fullmatch(node.value):
                yield node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if ast.unparse(node.func.value) == "os.environ" and node.args:
                yield from _constant(node.args[0])
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            yield from _constant(node.slice)


def _constant(expression: ast.expr) -> Iterator[str]:
    if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        yield expression.value


def find_problems(found: dict[str, list[str]]) -> Iterator[str]:
    """Variables without a line here, and lines without a variable."""
    described = {name for section in VARIABLES.values() for name in section}
    for name in sorted(found.keys() - described):
        yield f"{name}, of {', '.join(found[name])}, has no line in docs/make_environment.py"
    for name in sorted(described - found.keys() - NOT_IN_CODE):
        yield f"{name} has a line in docs/make_environment.py, and nothing names it"


def render_page() -> str:
    """The page: a list for each section."""
    shipped = dict(_SETTING.findall((ROOT / "deployments" / "settings.env").read_text("utf-8")))
    parts = [HEAD]
    for section, variables in VARIABLES.items():
        parts.append(f"\n## {section}\n\n")
        if section == INTERNAL:
            parts.append(f"{', '.join(f'`{name}`' for name in variables)}.\n")
            continue
        for name, (default, meaning) in variables.items():
            value = _value(default, shipped.get(name))
            parts.append(f"- `{name}`{f' ({value})' if value else ''}: {meaning}\n")
    return "".join(parts)


def _value(default: str, shipped: str | None) -> str:
    """What a variable is without a line in settings.env, and with it."""
    if shipped is None or shipped == default:
        return default
    return f"{default + ', ' if default else ''}`{shipped}` in settings.env"


def main(arguments: list[str]) -> str | None:
    """Write the page, or only look with --check; return what is wrong."""
    found = find_variables()
    if problems := list(find_problems(found)):
        return "\n".join(problems)
    return write_or_check(PAGE, render_page(), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
