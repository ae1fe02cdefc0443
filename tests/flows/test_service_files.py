"""The files that run server, worker and database as services: what would read them takes them."""

from __future__ import annotations

import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.process.environment import packaged_folder

FOLDER = packaged_folder("deployments")
UNITS = ("nested-tune-server.service", "nested-tune-worker@.service")
SERVE_UNIT = "user/nested-tune-serve@.service"
AGENTS = sorted((FOLDER / "launchd").glob("*.plist"))
# launchd.plist(5): the keys that ours use, and what each of them takes.
LAUNCHD = {"Label": str, "ProgramArguments": list, "WorkingDirectory": str, "RunAtLoad": bool}
LAUNCHD |= {"EnvironmentVariables": dict, "KeepAlive": bool, "StandardOutPath": str}
LAUNCHD |= {"StandardErrorPath": str, "Umask": int, "AbandonProcessGroup": bool}
# The Compose Specification: what a service of ours may hold.
SERVICE = {"image", "restart", "environment", "volumes", "healthcheck", "depends_on", "command"}
SERVICE |= {"env_file", "ports"}
SETTINGS = "/etc/nested-tune/settings.env"
SECRETS = ("POSTGRES_PASSWORD", "PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING")

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine"
)


def verify(unit: str, content: str, folder: Path) -> str:
    """What systemd says of a unit whose program is where it is on this machine."""
    installed = "/opt/nested-tune/.venv/bin/prefect"
    if unit == SERVE_UNIT:
        installed = "%h/.local/bin/nested-tune"
    assert installed in content
    path = folder / Path(unit).name.replace("@.", "@mlx-gpu.")
    path.write_text(
        content.replace(installed, str(Path(sys.executable).with_name(Path(installed).name)))
    )
    command = ["systemd-analyze", "verify", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stderr


@needs_systemd
@pytest.mark.parametrize("unit", [*UNITS, SERVE_UNIT])
def test_systemd_has_nothing_to_say_against_a_unit(unit: str, tmp_path: Path) -> None:
    assert verify(unit, (FOLDER / "systemd" / unit).read_text(), tmp_path) == ""


@needs_systemd
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_says_that_a_unit_is_little_exposed(unit: str) -> None:
    words = ["systemd-analyze", "security", "--offline=true", "--threshold=40"]
    command = [*words, str(FOLDER / "systemd" / unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout[-200:]


def test_server_and_worker_are_two_users_of_whom_the_server_alone_has_its_secrets(
    tmp_path: Path,
) -> None:
    server, worker = ((FOLDER / "systemd" / unit).read_text().splitlines() for unit in UNITS)
    assert {"DynamicUser=true", "UMask=0077"} < set(server)
    assert {"User=nested-tune", "UMask=0077"} < set(worker)
    read = re.compile(r"^(?:EnvironmentFile|LoadCredential)=(.+)$", re.M)
    settings = "/etc/nested-tune/settings.env"
    assert read.findall("\n".join(worker)) == [settings, "/etc/nested-tune/worker.env"]
    assert read.findall("\n".join(server)) == [settings, "server.env:/etc/nested-tune/server.env"]
    # What systemd would start, with a program that shows its variables in Prefect's place
    (line,) = (line for line in server if line.startswith("ExecStart="))
    (tmp_path / "server.env").write_text("A=postgresql+asyncpg://prefect:f0@127.0.0.1:5432/p\n")
    command = line.removeprefix("ExecStart=").replace("$$", "$")
    shown = subprocess.run(
        shlex.split(command.replace("/opt/nested-tune/.venv/bin/prefect server start", "env")),
        env={"CREDENTIALS_DIRECTORY": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "A=postgresql+asyncpg://prefect:f0@127.0.0.1:5432/p\n" in shown.stdout


def test_the_workers_unit_keeps_compiled_kernels_in_a_folder_of_its_own_user() -> None:
    lines = (FOLDER / "systemd" / UNITS[1]).read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("Environment=NESTED_TUNE_CACHE="))
    folder = line.rpartition("=")[2]
    assert f"ReadWritePaths={Path(folder).parent}" in lines


@pytest.mark.parametrize("agent", AGENTS, ids=lambda path: path.stem)
def test_an_agent_has_keys_that_launchd_knows_with_values_of_their_kind(agent: Path) -> None:
    values = plistlib.loads(agent.read_bytes())
    assert values["Label"] == agent.stem
    assert {key for key in values if key not in LAUNCHD} == set()
    assert {key for key, value in values.items() if type(value) is not LAUNCHD[key]} == set()
    assert values["Umask"] == 0o077
    shell, flag, script, *_ = values["ProgramArguments"]
    assert (shell, flag) == ("/bin/sh", "-c")
    subprocess.run([shell, "-n", "-c", script], check=True)


def test_the_agents_are_those_of_server_and_worker() -> None:
    assert [agent.stem for agent in AGENTS] == [
        "org.nested-tune.serve",
        "org.nested-tune.server",
        "org.nested-tune.worker-cpu",
        "org.nested-tune.worker",
    ]
    pools = []
    for agent in AGENTS[1:]:
        values = plistlib.loads(agent.read_bytes())
        script, arguments = values["ProgramArguments"][2], values["ProgramArguments"][3:]
        own = "server.env" if "server" in arguments else "worker.env"
        assert f". ./{own};" in script
        pools += [arguments[i + 1] for i, each in enumerate(arguments) if each == "--pool"]
        trains = "mlx-gpu" in arguments
        assert ("caffeinate -is -w $$ &" in script) is trains, "a Mac that trains stays awake"
    assert sorted(pools) == ["cpu", "mlx-gpu"]


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / "postgresql" / "compose.yaml").read_text())
    return content


def test_the_containers_name_only_what_is_there() -> None:
    content = compose()
    assert set(content) == {"services", "volumes"}
    services = content["services"]
    for service in services.values():
        assert set(service) <= SERVICE
        for name, wanted in service.get("depends_on", {}).items():
            assert wanted == {"condition": "service_healthy"}
            assert "healthcheck" in services[name]
        for volume in service.get("volumes", ()):
            assert volume.partition(":")[0] in content["volumes"]
        assert service.get("env_file", SETTINGS) == SETTINGS


def test_every_secret_of_the_containers_must_be_given_and_is_written_by_the_script() -> None:
    text = (FOLDER / "postgresql" / "compose.yaml").read_text()
    named = set(re.findall(r"\$\{(\w+)", text))
    assert named == set(re.findall(r"\$\{(\w+):\?", text)) == set(SECRETS)
    script = (FOLDER / "install.sh").read_text()
    for name in named:
        assert f"{name}=" in script


def test_docker_takes_the_containers_file(tmp_path: Path) -> None:
    command = ["docker", "compose"]
    has_compose = (
        shutil.which("docker") is not None
        and subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0
    )
    if not has_compose:
        pytest.skip("docker compose is not on this machine")
    settings = tmp_path / "settings.env"
    settings.write_text((FOLDER / "settings.env").read_text())
    file = tmp_path / "compose.yaml"
    text = (FOLDER / "postgresql" / "compose.yaml").read_text()
    file.write_text(text.replace(SETTINGS, str(settings)))
    secrets = dict.fromkeys(SECRETS, "x") | {"PATH": "/usr/local/bin:/usr/bin"}
    command += ["-f", str(file), "config", "--quiet"]
    subprocess.run(command, env=secrets, check=True, timeout=60)


def test_the_script_is_sound_and_keeps_its_secrets_closed() -> None:
    script = FOLDER / "install.sh"
    subprocess.run(["sh", "-n", str(script)], check=True)
    lines = script.read_text().splitlines()
    assert "set -eu" in lines
    for file in ("server.env", "worker.env"):
        assert lines.index("umask 077") < lines.index(f"cat >/etc/nested-tune/{file} <<SECRETS")
    worker = lines[lines.index("cat >/etc/nested-tune/worker.env <<SECRETS") + 1 :]
    assert worker[:2] == ["PREFECT_API_AUTH_STRING=admin:$auth", "SECRETS"], (
        "no password of the database"
    )


def test_the_servers_leases_outlive_its_container() -> None:
    server = compose()["services"]["server"]
    home = server["environment"]["PREFECT_HOME"]
    assert [v.partition(":")[2] for v in server["volumes"]] == [home]
    settings = (FOLDER / "settings.env").read_text()
    assert "LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem\n" in settings


def test_what_prefect_shows_to_everybody_lies_in_no_folder_that_a_flow_writes_in() -> None:
    server, worker = (
        (FOLDER / "systemd" / f"nested-tune-{unit}.service").read_text()
        for unit in ("server", "worker@")
    )
    (pages,) = re.findall(r"^Environment=PREFECT_SERVER_UI_STATIC_DIRECTORY=(.+)$", server, re.M)
    homes = re.findall(r"^(?:ReadWritePaths=|Environment=NESTED_TUNE_HOME=)(.+)$", worker, re.M)
    assert len(homes) == 2
    assert not any(Path(pages).is_relative_to(home) for home in homes)
    assert pages == "/var/cache/nested-tune-server/ui"  # of CacheDirectory, which systemd makes
    made = {"CacheDirectory=nested-tune-server", "CacheDirectoryMode=0700"}
    assert made < set(server.splitlines())
