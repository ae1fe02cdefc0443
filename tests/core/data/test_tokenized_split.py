"""Token files: the same bytes in any number of processes, mapped, verified, and small in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import dataset_cache, load_dataset
from nested_core.data.sources.split_files import SplitFile
from nested_core.data.tokens.parallel_tokenization import LinesToTokenize, tokenize_splits
from nested_core.data.tokens.tokenized_split import open_tokens
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError, DamagedError
from tests.builders.data_sets import load
from tests.core.data.conftest import TEMPLATE, WriteData, build_tokenizer

ROWS = 3_000
REFUSING = "{% if 'refuse' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"


def chats(count: int) -> list[bytes]:
    """Lines of different lengths; every 97th is blank, every 101st raises in the template."""
    lines = []
    for number in range(1, count + 1):
        word = "refuse" if number % 101 == 0 else "Where"
        turns = [
            {"role": "user", "content": f"{word} is {number}?"},
            {"role": "assistant", "content": "Here. " * (1 + number % 23)},
        ]
        lines.append(b"" if number % 97 == 0 else json.dumps({"messages": turns}).encode())
    return lines


@pytest.mark.slow("starts three processes that import transformers")
def test_the_bytes_are_the_same_in_any_number_of_processes(
    write_data: WriteData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nested_core.data.tokens.parallel_tokenization.RANGE_BYTES", 2**15)
    tokenizer = build_tokenizer(REFUSING + TEMPLATE)
    folder = write_data(train=chats(ROWS), valid=chats(150), test=[])
    skip = {"train": {1, 5, ROWS // 2, ROWS - 1}, "valid": {2}, "test": set[int]()}
    splits = {
        split: LinesToTokenize(
            SplitFile(f"{split}.jsonl", folder / f"{split}.jsonl"), frozenset(lines)
        )
        for split, lines in skip.items()
    }
    found = []
    for processes in (1, 3):
        out = tmp_path / str(processes)
        out.mkdir()
        progress: list[tuple[str, int, int]] = []
        facts = tokenize_splits(
            out,
            splits,
            DataSettings(str(folder), max_seq_length=64, supervise="all"),
            tokenizer,
            processes=processes,
            on_progress=lambda *args, seen=progress: seen.append(args),
        )
        total = len(progress)
        assert total > 10
        assert progress == [("tokenising", done, total) for done in range(1, total + 1)]
        files = {path.name: path.read_bytes() for path in out.iterdir()}
        found.append((files, {s: (f.examples.tobytes(), f.problems) for s, f in facts.items()}))
        raised = "the chat template does not take these turns: TemplateError: no"
        assert facts["train"].problems[0] == (101, "chat-template-raised", raised)
        lines = facts["train"].examples["line"].tolist()
        left_out = skip["train"] | {n for n in range(1, ROWS + 1) if n % 97 == 0 or n % 101 == 0}
        assert lines == [n for n in range(1, ROWS + 1) if n not in left_out]
    assert found[0] == found[1]
    names = {
        f"{split}.{kind}"
        for split in splits
        for kind in ("tokens", "target_mask", "starts", "lines", "contents", "beginnings")
    }
    assert set(found[0][0]) == names


def asked(answer: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant"} | answer]}


CALL = {"tool_calls": [{"function": {"name": "find", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("plain", "ended", "other"),
    [
        (asked({"content": "Me."}), asked({"content": "Me.<|end|>"}), asked({"content": "You."})),
        (asked(CALL), asked(CALL | {"content": "<|end|>"}), asked(CALL | {"content": "Me."})),
        ({"text": "Me."}, {"text": "Me.<|end|>"}, {"text": "<|end|>Me."}),
    ],
)
def test_a_row_that_ends_already_has_the_tokens_and_the_digest_of_one_that_does_not(
    plain, ended, other, write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    train = load(write_data(train=[plain, ended, other], valid=[]), tokenizer)[1]["train"]
    assert train.example(0).tolist() == train.example(1).tolist() != train.example(2).tolist()
    assert train.contents[0] == train.contents[1] != train.contents[2]


OWN_CODE = """
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    def encode(self, text, **more):
        return super().encode(text.upper(), **more)
"""


def write_own_tokenizer() -> str:
    """A tokenizer whose folder brings code of its own, which writes everything large."""
    folder = Path(build_tokenizer(TEMPLATE).folder)
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    own = {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | own))
    (folder / "own.py").write_text(OWN_CODE)
    return str(folder)


@pytest.mark.slow("starts three processes that import transformers")
def test_a_tokenizers_own_code_runs_in_workers_where_it_is_trusted_and_nowhere_else(
    write_data: WriteData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nested_core.data.tokens.parallel_tokenization.RANGE_BYTES", 2**7)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))  # the workers' alone
    folder = write_data(train=[{"text": f"number {n}"} for n in range(20)])
    sound = {
        "train": LinesToTokenize(SplitFile("train.jsonl", folder / "train.jsonl"), frozenset())
    }
    settings, own = DataSettings(str(folder)), write_own_tokenizer()
    out = tmp_path / "out"
    out.mkdir()
    trusted = TokenizerSource(own, trust_remote_code=True)
    tokenize_splits(out, sound, settings, trusted, processes=2)
    tokens = np.fromfile(out / "train.tokens", "<i4").tolist()
    plain = build_tokenizer(TEMPLATE).load()
    assert plain.decode(tokens).startswith("NUMBER 0<|end|>NUMBER 1<|end|>")
    with pytest.raises(ConfigError, match="contains custom code which must be executed"):
        TokenizerSource(own).load()


@pytest.fixture
def kept(write_data: WriteData, tmp_path: Path, tokenizer: TokenizerSource) -> Path:
    """The folder of tokens in a cache."""
    folder = write_data(train=[{"text": f"{n} is here."} for n in range(9)], valid=[])
    cache = dataset_cache(tmp_path / "cache")
    _, splits = load_dataset(DataSettings(str(folder)), tokenizer, cache=cache)
    assert [len(splits["train"]), len(splits["valid"])] == [9, 0]
    (entry,) = cache.folder.iterdir()
    return entry


def test_what_was_written_is_read_again_from_the_folder(kept, write_data, tokenizer) -> None:
    again = open_tokens(kept)
    fresh = load_dataset(DataSettings(str(write_data())), tokenizer)[1]
    assert list(again) == ["train", "valid"]
    for split in again:
        for name in ("tokens", "target_mask", "starts", "lines"):
            mine, other = getattr(again[split], name), getattr(fresh[split], name)
            assert mine.dtype == other.dtype
            assert mine.tolist() == other.tolist()
    assert not again["train"].tokens.flags.writeable


def test_files_that_nobody_keeps_are_gone_and_can_still_be_read(
    write_data, tokenizer, tmp_path, monkeypatch
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(private))
    folder = write_data(train=[{"text": f"{n} is here."} for n in range(9)])
    _, splits = load(folder, tokenizer)
    assert list(private.iterdir()) == []
    train = splits["train"]
    train.release_pages()
    assert tokenizer.load().decode(train.example(8).tolist()) == "8 is here.<|end|>"


def test_a_file_of_another_size_is_refused_each_time(kept: Path) -> None:
    open_tokens(kept)
    path = kept / "train.tokens"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DamagedError, match=r"train.tokens is not the file of \d+ bytes it was"):
        open_tokens(kept)


def test_a_changed_byte_is_refused_when_a_process_first_opens_it(kept: Path) -> None:
    path = kept / "train.target_mask"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="train.target_mask has changed since it was written"):
        open_tokens(kept)


@pytest.mark.parametrize("name", ["train.starts", "MANIFEST.json"])
def test_a_missing_file_is_refused(kept: Path, name: str) -> None:
    (kept / name).unlink()
    with pytest.raises(DamagedError, match=name):
        open_tokens(kept)


USE = """
import sys
from contextlib import closing
from pathlib import Path
from nested_core.data.batches import BatchOrder
from nested_core.data.tokens.tokenized_split import open_tokens
split = open_tokens(Path(sys.argv[1]))["train"]
plan = BatchOrder(split.lengths, 8, 0)
for index in range(plan.batches_per_epoch):
    plan.arrays(split, index)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow("tokenizes ten times as many examples")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its peak from /proc")
def test_an_epoch_takes_the_same_memory_over_ten_times_the_tokens(tmp_path: Path) -> None:
    peaks = [peak_megabytes(tmp_path / str(rows), rows) for rows in (4_000, 40_000)]
    print("peak resident MB with 1x and 10x the rows:", peaks)
    assert peaks[1] - peaks[0] < 12  # the arrays are 20 MB and 200 MB; 100 bytes a row are the plan


def peak_megabytes(folder: Path, rows: int) -> float:
    """What a process that makes the batches of an epoch has resident at most."""
    lengths = np.full(rows, 1_000)
    write_arrays(folder, lengths)
    command = [sys.executable, "-c", USE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024


def write_arrays(folder: Path, lengths: Any) -> None:
    """Token files of examples of these lengths, as tokenising leaves them."""
    from nested_core.data.tokens.tokenized_split import (
        SplitWriter,
        write_manifest_and_open_tokens,
        write_token_part,
    )

    folder.mkdir()
    with closing(SplitWriter(folder / "train")) as joined:
        for first in range(0, len(lengths), 1_000):
            some = lengths[first : first + 1_000]
            tokens = [token for length in some for token in range(length)]
            arrays = {"tokens": tokens, "target_mask": np.zeros(len(tokens)), "beginnings": []}
            write_token_part(folder / "part", **arrays)
            records = np.zeros(len(some), [("line", "<i4"), ("length", "<i4"), ("content", "<u8")])
            records["length"] = some
            joined.append_part(folder / "part", records)
    write_manifest_and_open_tokens(folder)
