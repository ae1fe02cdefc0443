"""The files that run `serve` as a service give it what it takes."""

from __future__ import annotations

import plistlib

from flows.cli import build_parser
from flows.process.environment import packaged_folder

FOLDER = packaged_folder("deployments")


def test_unit_and_agent_of_a_server_give_serve_what_it_takes() -> None:
    (line,) = (
        line
        for line in (FOLDER / "systemd" / "user" / "nested-tune-serve@.service")
        .read_text()
        .splitlines()
        if line.startswith("ExecStart=")
    )
    program, *unit = line.replace("${PORT}", "8080").removeprefix("ExecStart=").split()
    agent = plistlib.loads((FOLDER / "launchd" / "org.nested-tune.serve.plist").read_bytes())
    assert program.endswith("/nested-tune")
    for words, name in ((unit, "%i"), (agent["ProgramArguments"][4:], "NAME")):
        parsed = build_parser().parse_args(words)
        assert (parsed.command, parsed.name, parsed.host, parsed.port) == (
            "serve",
            [name],
            "127.0.0.1",
            8080,
        )
