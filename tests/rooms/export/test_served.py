"""What is written for the programs that serve a GGUF, and a llama-server that is asked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from nested_core import export
from nested_core.errors import ConfigError, DamagedError, GateRejected, NestedTuneError
from nested_core.records.dataset import PromptFormat
from nested_core.rooms.export.asked import Asked, has_llama_cpp
from nested_core.rooms.export.export_record import ServedBy, read_export_record
from nested_core.rooms.export.exporting import Export
from nested_core.rooms.export.served_as import Turns, has_server, starting_server, write_for
from tests.example import DATA
from tests.production.processes import command_of
from tests.rooms.export.small_bases import (
    TEMPLATE,
    example_rows,
    make_base,
    make_tokenizer,
    train_adapter,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.slow("writes whole models, and starts servers of them")

HELD_OUT = DATA / "valid.jsonl"
NEEDS_SERVER = pytest.mark.skipif(
    not (has_server() and has_llama_cpp()), reason="llama-server is not here: make llama-server"
)
WITH_SYSTEM_TEXT = (
    "{%- if messages[0]['role'] != 'system' -%}{{- '<|system|>Be brief.<|end|>' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{{- '<|end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def tokenizer_with(template: str | None) -> TokenizerWrapper:
    tokenizer = make_tokenizer("llama")
    tokenizer.chat_template = template
    return TokenizerWrapper(tokenizer)


def test_a_template_of_texts_around_messages_is_said_in_ollama_s_language() -> None:
    turns = Turns.find(tokenizer_with(WITH_SYSTEM_TEXT))
    assert turns is not None
    assert turns.system == "Be brief."
    assert turns.to_go() == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|system|>{{ .Content }}<|end|>'
        '{{ else if eq .Role "user" }}<|user|>{{ .Content }}<|end|>'
        '{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}<|end|>'
        "{{ end }}{{ end }}<|assistant|>"
    )


DOES_MORE = {
    "trims contents": WITH_SYSTEM_TEXT.replace(
        "message['content'] -", "message['content'].strip() -"
    ),
    "leaves the system text out": WITH_SYSTEM_TEXT.replace("in messages", "in messages[1:]"),
    "marks the last message": WITH_SYSTEM_TEXT.replace(
        "{{- '<|end|>' -}}", "{{- '<|end|>' if loop.last else '' -}}"
    ),
    "refuses a system text": "{{ raise_exception('no') if messages[0].role == 'system' }}",
    "is not there": None,
}


@pytest.mark.parametrize("how", DOES_MORE)
def test_a_template_that_does_more_is_not_said(how: str) -> None:
    assert Turns.find(tokenizer_with(DOES_MORE[how])) is None


def write(folder: Path, program: Any, tokenizer: Any, *, system: str | None = None) -> str:
    (folder / "config.json").write_text('{"max_position_embeddings": 128}')
    files = {"m.gguf": "a" * 64, "lora.gguf": "b" * 64}
    asked = Asked(folder, tokenizer, prompt_format=PromptFormat(system=system))
    return write_for(program, folder / "lora.gguf", files, asked).read_text()


def test_a_modelfile_has_files_template_system_text_and_ends(tmp_path: Path) -> None:
    text = write(tmp_path, "ollama", tokenizer_with(WITH_SYSTEM_TEXT))
    assert f"# sha256:{'b' * 64} lora.gguf\nFROM ./m.gguf\nADAPTER ./lora.gguf\nTEMPLATE " in text
    assert '<|assistant|>"""\nSYSTEM """Be brief."""\n' in text
    assert 'PARAMETER num_ctx 128\nPARAMETER stop "<|endoftext|>"\n' in text
    own = write(tmp_path, "ollama", tokenizer_with(WITH_SYSTEM_TEXT), system="In one word.")
    assert 'SYSTEM """In one word."""' in own
    hostile = tokenizer_with(WITH_SYSTEM_TEXT)
    hostile._tokenizer.add_special_tokens({"eos_token": '"\nADAPTER /b.gguf\n#'})
    lines = write(tmp_path, "ollama", hostile).splitlines()
    assert "ADAPTER /b.gguf" not in lines
    without = write(tmp_path, "ollama", tokenizer_with(DOES_MORE["trims contents"]))
    assert "# No TEMPLATE" in without
    assert 'TEMPLATE """' not in without
    for quoted in ('Say """\nPARAMETER seed 9\nthen', 'Say "yes"'):
        cut = write(tmp_path, "ollama", tokenizer_with(WITH_SYSTEM_TEXT), system=quoted)
        assert 'TEMPLATE """' in cut
        assert "# No SYSTEM: its quotes" in cut
        assert quoted not in cut


def test_a_program_that_is_not_here_is_said_not_to_be_tried(trained, tmp_path) -> None:
    programs = ["ollama", "lmstudio", "ollama"]  # once is enough
    done = export(trained().adapter, gguf=tmp_path / "m y;.gguf", programs=programs)
    record = read_export_record(done.path)
    assert record is not None
    assert [each.describe() for each in record.served] == [
        "not tried in Ollama",
        "not tried in LM Studio",
    ]
    assert [each.command(Path("a b")) for each in record.served] == [
        "ollama create 'm y;' -f 'a b/m y;.Modelfile'",
        "sh 'a b/m y;.lmstudio.sh'",
    ]
    digest = record.files["m y;.gguf"]
    for each in record.served:
        read = (tmp_path / each.reads).read_text()
        assert f"# sha256:{digest} m y;.gguf\n" in read
        assert "LLAMA_ARG" not in read  # which is llama-server's


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"fused": "f", "programs": ["ollama"]}, "--for is of a GGUF"),
        ({"gguf": "m.gguf", "base_gguf": "b.gguf"}, "--base-gguf is what --gguf-adapter"),
        ({"gguf": "-m.gguf"}, "begins with - for a flag"),
        ({"gguf": "m\ntouch a.gguf", "programs": ["ollama"]}, "control character"),
        ({"gguf": "taken.gguf", "programs": ["ollama"]}, r"taken\.Modelfile exists already"),
    ],
)
def test_what_no_program_could_serve_is_refused(asked, said, tmp_path) -> None:
    (tmp_path / "taken.Modelfile").touch()
    with pytest.raises(ConfigError, match=said):
        export("nothing", **{k: tmp_path / v if k != "programs" else v for k, v in asked.items()})


@pytest.mark.skipif(not has_llama_cpp(), reason="llama.cpp is not here")
@pytest.mark.parametrize(
    ("program", "said"), [("lmstudio", "takes no LoRA"), ("ollama", "to its base")]
)
def test_a_lora_alone_needs_a_program_that_applies_it_and_a_base(program, said, tmp_path) -> None:
    with pytest.raises(ConfigError, match=said):
        export("nothing", gguf_adapter=tmp_path / "lora.gguf", programs=[program])


@pytest.mark.skipif(not has_llama_cpp(), reason="llama.cpp is not here")
def test_a_base_that_is_no_gguf_or_the_lora_itself_is_refused(tmp_path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(DamagedError, match=r"base\.gguf is no sound GGUF"):
        export("nothing", gguf_adapter=tmp_path / "m.gguf", base_gguf=tmp_path / "base.gguf")
    with pytest.raises(ConfigError, match="would be one"):
        export("nothing", gguf_adapter=tmp_path / "m.gguf", base_gguf=tmp_path / "m.gguf")


ARTEFACTS: dict[str, dict[str, Any]] = {
    "f16": {"gguf": "m.gguf"},
    "q4_k_m": {"gguf": "m.gguf", "quantize": "q4_k_m"},
    "lora": {"gguf_adapter": "m.gguf", "base_gguf": "base.gguf"},
    "lora on q4_k_m": {"gguf_adapter": "m.gguf", "base_gguf": "base.gguf", "quantize": "q4_k_m"},
}


def export_for_server(adapter: Path, folder: Path, asked: dict[str, Any], **more: Any) -> ServedBy:
    places = {key: folder / value if "gguf" in key else value for key, value in asked.items()}
    done: Export = export(adapter, data=HELD_OUT, programs=["llama-server"], **places, **more)
    (served,) = done.record.served
    assert read_export_record(done.path) == done.record
    return served


@NEEDS_SERVER
@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_a_llama_server_goes_on_as_the_file_alone(artefact, trained, tmp_path) -> None:
    served = export_for_server(trained().adapter, tmp_path, ARTEFACTS[artefact])
    assert served.is_tried
    assert served.program.startswith("llama-server ")
    assert served.shared >= 0.6 * served.tokens > 0


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that answers, and ends, as its rows do; with a suite of these beside it."""
    folder = tmp_path_factory.mktemp("learned")
    adapter = train_adapter(make_base(folder / "base", "qwen2"), folder / "adapter", steps=250)
    rows = [row["messages"] for row in example_rows()[:16]]
    lines = [{"messages": row[:-1], "expected": row[-1]["content"]} for row in rows]
    (folder / "suite.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return adapter


@NEEDS_SERVER
@pytest.mark.parametrize("artefact", ["f16", "lora"])
def test_a_llama_server_answers_a_suite_as_the_adapter(artefact, learned, tmp_path) -> None:
    suite = learned.with_name("suite.jsonl")
    served = export_for_server(learned, tmp_path, ARTEFACTS[artefact], suites=[suite])
    (count,) = served.suites
    assert count.questions == 16
    assert count.adapter > 10
    assert abs(count.exported - count.adapter) <= 1


def put_server_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A llama-server that does something else; `$real` is the one that is here."""
    folder.mkdir()
    real = shutil.which("llama-server")
    program = folder / "llama-server"
    program.write_text(f"#!/bin/sh\nreal={real}\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


WITHOUT_SYSTEM_TEXT = TEMPLATE.replace("in messages", "in messages if message.role != 'system'")
BROKEN_SERVERS = {
    "ignores --lora": ('shift 4; exec $real --model base.gguf "$@"', "does not apply it"),
    "gives --lora no weight": (
        'shift 4; exec $real --model base.gguf --lora-scaled m.gguf:0 "$@"',
        "does not apply it",
    ),
    "has no system text": (
        'exec $real "$@" --chat-template-file template.jinja',
        "llama-server writes a chat as '<|user|>What is it",
    ),
    "takes no end for one": ('exec $real "$@" --ignore-eos', "do not end in llama-server"),
    "serves the base": ('shift 2; exec $real --model "$BASE" "$@"', "that the file alone gives"),
    "ends at once": ("echo out of luck; exit 3", "exit code 3; its last words: out of luck"),
}


@NEEDS_SERVER
@pytest.mark.parametrize("how", BROKEN_SERVERS)
def test_a_llama_server_that_does_something_else_is_seen(
    how: str, learned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, said = BROKEN_SERVERS[how]
    template = tmp_path / "template.jinja"
    template.write_text(WITHOUT_SYSTEM_TEXT)
    script = script.replace("template.jinja", str(template))
    artefact = ARTEFACTS["lora" if "lora" in how.lower() else "f16"]
    if how == "serves the base":
        export(
            learned, gguf_adapter=tmp_path / "other.gguf", base_gguf=tmp_path / "b", data=HELD_OUT
        )
        monkeypatch.setenv("BASE", str(tmp_path / "b"))
    put_server_on_path(tmp_path / "bin", monkeypatch, script)
    with pytest.raises(GateRejected, match=said):
        export_for_server(learned, tmp_path, artefact, suites=[learned.with_name("suite.jsonl")])
    assert not (tmp_path / "m.gguf").exists()
    assert not list(tmp_path.glob("*.llama-server.sh"))


FAKE_SERVER = """
import os, signal, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def do_POST(self):
        print("out of luck", flush=True)
        FAILS

HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""
ENDS_BY_SIGNAL = (
    "self.connection.shutdown(2); time.sleep(0.3); os.kill(os.getpid(), signal.SIGSEGV)"
)
FAILURES = {
    "ends by a signal": (ENDS_BY_SIGNAL, "exit code -11; its last words: out of luck"),
    "goes on": ("self.send_error(500)", "500 .*it goes on; its last words: out of luck"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_server_that_fails_at_a_question_is_told_with_its_last_words(
    how: str, tmp_path: Path
) -> None:
    fails, said = FAILURES[how]
    (tmp_path / "fake.py").write_text(FAKE_SERVER.replace("FAILS", fails))
    script = tmp_path / "llama-server.sh"
    script.write_text(f'ulimit -c 0; exec {sys.executable} {tmp_path / "fake.py"} "$@"')
    failed = pytest.raises(NestedTuneError, match=f"(?s){said}")
    with failed, starting_server(script) as server:
        server.ask("/completion", prompt=[1])


EXPORTS = """
import time
from nested_core.process.child import Child
from nested_core.rooms.export.served_as import PROGRAM
with Child(PROGRAM) as process:
    process.send([["sh", "-c", "echo $$ > begun; mv begun server; exec sleep 3600"], "log"])
    time.sleep(3600)
"""


def test_a_server_ends_when_what_started_it_is_killed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    exports = subprocess.Popen([sys.executable, "-c", EXPORTS], cwd=tmp_path, env=environment)
    wait_until((tmp_path / "server").exists, process=exports)
    server = int((tmp_path / "server").read_text())
    wait_until(lambda: command_of(server) == "sleep 3600 ", "the server's program")
    exports.kill()
    exports.wait()
    wait_until(lambda: command_of(server) == "", "the server's end")
