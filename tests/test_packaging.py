"""The wheel: what is in it, and that it works from a folder with its own tasks.py and flows/."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.builders.data_sets import chat, write_lines
from tests.example import write_config
from tests.left_out import needs_rooms

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CAPITALS = [("France", "Paris"), ("Peru", "Lima"), ("Kenya", "Nairobi"), ("Japan", "Tokyo")]


def run(
    *command: str | Path, cwd: Path, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command as a person in `cwd` would, with `path` as PYTHONPATH, without by default."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {} if path is None else {"PYTHONPATH": path}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir")
    done = run(*build, out, ROOT, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nested-tune as the wheel installs it, over the dependencies of the running environment."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    (libraries,) = folder.glob("lib/python*/site-packages")
    dependencies = [
        entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))
    ]
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install")
    done = run(*pip, "--no-deps", "--no-index", "--quiet", wheel, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    # Behind the wheel's own files; as lines of a .pth their own .pth files, an editable install's
    # among them, are not read.
    (libraries / "zz_dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return folder / "bin" / "nested-tune"


TRAP = "raise RuntimeError('the folder of the person was imported')\n"


@pytest.fixture
def clashing(tmp_path: Path) -> Path:
    """A person's project with a package `flows` and a module `tasks`, which fail when imported."""
    (tmp_path / "tasks.py").write_text(TRAP)
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text(TRAP)
    return tmp_path


@pytest.fixture
def foreign(clashing: Path) -> Path:
    """One with a package `nested_core` too."""
    (clashing / "nested_core").mkdir()
    (clashing / "nested_core" / "__init__.py").write_text(TRAP)
    return clashing


def run_ours(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this checkout's command line, with a person's folder first on Python's path."""
    main = "import sys, nested_core.process.our_packages as ours; sys.exit(ours.main())"
    return run(sys.executable, "-P", "-c", main, *arguments, cwd=folder, path=f".:{ROOT}")


def write_data_with_one_bad_line(folder: Path) -> None:
    """Write config.yaml and its data set, whose last line is no JSON."""
    chats = [chat(f"What is the capital of {name}?", f"{capital}.") for name, capital in CAPITALS]
    write_lines(folder / "data" / "train.jsonl", [*chats, b'{"messages": ['])
    (folder / "config.yaml").write_text("model: no-model\ndata: data\nbatch_size: 1\n")


def require_the_one_bad_line(done: subprocess.CompletedProcess[str]) -> None:
    """Fail unless `validate --json` rejected the data set for its last line alone."""
    assert done.returncode == 3, done.stderr
    errors = [f for f in json.loads(done.stdout)["findings"] if f["severity"] == "error"]
    assert [error["line"] for error in errors] == [len(CAPITALS) + 1]


VALIDATE = ("validate", "-c", "config.yaml", "--no-tokenize", "--json")


@pytest.mark.slow("builds a wheel")
def test_the_wheel_holds_the_packages_their_data_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"nested_tune-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"flows", "tasks", "nested_core", info}
    for package in ("flows", "tasks", "nested_core"):
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_style_of_pages_is_in_the_wheel(wheel: Path) -> None:
    assert "nested_core/text/page.css" in zipfile.ZipFile(wheel).namelist()


@needs_rooms("cuda")
def test_every_source_of_a_cuda_kernel_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    folder = ROOT / "nested_core" / "rooms" / "cuda"
    sources = {path.relative_to(ROOT).as_posix() for path in folder.glob("*.cu*")}
    assert {Path(name).suffix for name in sources} == {".cu", ".cuh"}
    assert sources - set(names) == set()


@pytest.mark.parametrize("folder", ["examples", "deployments"])
def test_every_tracked_file_of_a_shipped_folder_is_in_the_wheel(wheel: Path, folder: str) -> None:
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if "/_shipped/" in name}
    listed = run("git", "ls-files", "--", folder, cwd=ROOT).stdout.splitlines()
    assert [name for name in listed if f"flows/_shipped/{name}" not in shipped] == []
    assert [name for name in shipped if name.startswith(f"flows/_shipped/{folder}/")]


def test_the_metadata_offers_one_mlx_library_at_a_time_and_names_no_address(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"nested_tune-{PROJECT['version']}.dist-info/METADATA").decode()
    required = re.findall(r"^Requires-Dist: (mlx\b.*)$", metadata, re.MULTILINE)
    assert [line for line in required if "[" in line] == [
        "mlx[cpu]<0.33,>=0.32.4; (sys_platform == 'linux') and extra == 'cpu'",
        "mlx[cuda13]<0.33,>=0.32.4; (sys_platform == 'linux') and extra == 'cuda'",
    ]
    assert "mlx<0.33,>=0.32.4" in required
    assert "Requires-Python: <3.14,>=3.11" in metadata


@pytest.mark.slow("a process that imports all")
def test_version_from_a_foreign_folder(command: Path, foreign: Path) -> None:
    done = run(command, "--version", cwd=foreign)
    assert done.returncode == 0, done.stderr
    assert PROJECT["version"] in done.stdout


@pytest.mark.slow("a process that imports Prefect")
def test_validate_from_a_foreign_folder_rejects_the_one_bad_line(command, foreign) -> None:
    write_data_with_one_bad_line(foreign)
    require_the_one_bad_line(run(command, *VALIDATE, cwd=foreign))


def test_validate_uses_our_packages_where_the_path_begins_with_others(clashing: Path) -> None:
    write_data_with_one_bad_line(clashing)
    require_the_one_bad_line(run_ours(clashing, *VALIDATE))


def test_version_without_our_finder_fails_where_the_path_begins_with_others(clashing) -> None:
    main = "import sys, flows.cli; sys.exit(flows.cli.main())"
    done = run(sys.executable, "-P", "-c", main, "--version", cwd=clashing, path=f".:{ROOT}")
    assert "the folder of the person was imported" in done.stderr


def test_another_module_of_our_name_that_is_imported_already_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text("")
    program = "import tasks, nested_core.process.our_packages as ours; ours.main()"
    done = run(sys.executable, "-P", "-c", program, cwd=tmp_path, path=f".:{ROOT}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: nested-tune has a package tasks, and this process has imported another "
        f"module of that name already: {tmp_path / 'tasks.py'}. Import nested-tune's first, or "
        f"rename that one."
    )


@pytest.mark.slow("a wheel, a fine-tune and a flow run, with a Prefect server")
def test_the_wheel_works_with_the_folder_of_a_person_first_on_the_path(command, clashing) -> None:
    """`train` starts a process for the training, `demo` one for Prefect's server."""
    version = run(command, "--version", cwd=clashing, path=".")
    assert (version.returncode, version.stderr) == (0, "")
    assert PROJECT["version"] in version.stdout
    write_config(clashing / "config.yaml", iters=4, val_batches=1)
    trained = run(command, "train", "-c", "config.yaml", "--json", cwd=clashing, path=".")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["verdict"] == "passed"
    shown = run(command, "demo", cwd=clashing, path=".")
    assert shown.returncode == 0, shown.stderr
    assert "right answers: " in shown.stdout


@pytest.mark.slow("runs a deployment's flow in a process of its own")
def test_the_command_of_a_deployment_finds_our_flows(clashing: Path) -> None:
    """Each command starts a module that imports the flow, in place of Prefect's engine."""
    (clashing / "engine.py").write_text("import flows.finetune, tasks.finetune\nprint('found')\n")
    text = (ROOT / "deployments" / "prefect.yaml").read_text(encoding="utf-8")
    commands = re.findall(r'command: "{{ \$NESTED_TUNE_PYTHON }} (.*) prefect\.engine"', text)
    assert len(commands) == text.count("prefect.engine") == 2
    for words in commands:
        done = run(sys.executable, *words.split(), "engine", cwd=clashing, path=f".:{ROOT}")
        assert (done.returncode, done.stdout) == (0, "found\n"), done.stderr


def test_the_locks_pin_every_line_with_hashes_and_name_no_address() -> None:
    for lock in (ROOT / "requirements").glob("*.lock"):
        text = lock.read_text(encoding="utf-8")
        assert "://" not in text
        assert not re.search(r"^\s*(-i|--(extra-)?index-url|--find-links|-f)\b", text, re.MULTILINE)
        pinned = re.findall(r"^[a-z][^\n]*==[^\n]*\\\n    --hash=sha256:", text, re.MULTILINE)
        assert len(pinned) == len(re.findall(r"^[a-z]", text, re.MULTILINE))
        assert len(pinned) > {"llama-cpp.lock": 1, "release.lock": 40}.get(lock.name, 100)


def dry_run(*words: str) -> str:
    """What make would do."""
    command = ("make", "--dry-run", "--no-print-directory", f"PYTHON={sys.executable}", *words)
    return subprocess.check_output(command, cwd=ROOT, text=True)


@pytest.mark.parametrize(
    ("extras", "locks"),
    [("", ["run"]), ("hub mlflow", ["run", "hub", "mlflow"]), ("cuda hub", ["cuda", "hub"])],
)
def test_extras_are_installed_from_locks_with_hashes(extras: str, locks: list[str]) -> None:
    named = " ".join(f"-r requirements/{lock}.lock" for lock in locks)
    printed = dry_run("--always-make", "install", f"EXTRAS={extras}")
    assert f"--only-binary :all: --require-hashes {named}\n" in printed


@pytest.mark.parametrize("name", ["cuda", "docker", "hub", "kubernetes", "mirror", "mlflow"])
def test_the_lock_of_an_extra_holds_the_versions_of_the_run_lock(name: str) -> None:
    run_lock, lock = (
        dict(re.findall(r"^([a-z][^ ;]*)==([^ ;]+)", (ROOT / path).read_text(), re.M))
        for path in ("requirements/run.lock", f"requirements/{name}.lock")
    )
    differing = {package for package, version in run_lock.items() if lock.get(package) != version}
    assert differing == {"mlx-cpu"}


def test_what_runs_elsewhere_is_named_by_its_commit() -> None:
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    assert text.count("uses:") == len(re.findall(r"uses: \S+@[0-9a-f]{40} # v", text)) > 0


def test_a_release_is_refused_where_an_image_has_no_digest() -> None:
    assert "image:" in dry_run("release").splitlines()[0], "the images are not looked at first"
    done = run("make", "pinned-images", cwd=ROOT)
    assert done.returncode != 0
    assert "Name each of these images by its digest first" in done.stderr


def test_the_development_lock_holds_the_versions_of_the_run_lock() -> None:
    run_lock, dev_lock = (
        set(re.findall(r"^[a-z][^ ;]*==[^ ;]+", (ROOT / "requirements" / name).read_text(), re.M))
        for name in ("run.lock", "dev.lock")
    )
    assert len(run_lock) > 100
    assert run_lock <= dev_lock
