"""The image of deployments/image: what is in it, and what its programs import.

NESTED_TUNE_TEST_CONTAINER runs a container, such as "docker run --rm"; the image nested-tune is
built before, as deployments/README.md says.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

RUN = os.environ.get("NESTED_TUNE_TEST_CONTAINER")
pytestmark = [
    pytest.mark.production,
    pytest.mark.skipif(RUN is None, reason="NESTED_TUNE_TEST_CONTAINER is not set"),
]


def in_image(*arguments: str) -> str:
    """What a command in a container prints: options, the image, and the command."""
    return subprocess.check_output([*shlex.split(str(RUN)), *arguments], text=True)


def test_nothing_is_imported_from_the_folder_of_a_run(tmp_path: Path) -> None:
    """Prefect puts that folder into PYTHONPATH, and a person's may have a package `flows`."""
    tmp_path.chmod(0o755)
    for name in ("flows", "tasks", "yaml", "prefect"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('theirs')")
    mounted = ("--volume", f"{tmp_path}:/work:ro", "--env", "PYTHONPATH=/work", "nested-tune")
    program = "import flows, tasks, yaml, prefect; print(flows.__file__, yaml.__file__)"
    for file in in_image(*mounted, "python", "-c", program).split():
        assert file.startswith("/opt/nested-tune/")
    assert in_image(*mounted, "nested-tune", "--version").startswith("nested-tune ")


def test_it_has_an_unprivileged_user_and_no_compiler_no_pip_and_no_setuid_program() -> None:
    program = "id -u; command -v cc gcc g++ pip; find / -xdev -perm /6000 -type f 2>/dev/null"
    assert in_image("nested-tune", "sh", "-c", f"{program}; true") == "1000\n"
