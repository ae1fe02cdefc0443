"""Whole commands, from exec to exit: `nested-tune train` against `mlx_lm.lora`, on the same file.

Each row of ROWS.jsonl is one run of one program: wall and CPU seconds, the time of each line that
it printed, and the most memory that the device and the processes held. Rows that are there already
are not measured again, so that a table can be made in several goes; within a case the programs
take turns. `cold` empties the folders of compiled kernels before a run. Models have random weights
and answer with the words in their order (`write_model`), rows are chats of made-up words whose
lengths are log-normal. `--report` prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.shapes import KEYS, RANK, SCALE, SHAPES, Shape

PROGRAMS = ("mlx_lm.lora", "nested-tune train")
TRAIN_ROWS, VALID_ROWS = 1200, 100
WORDS_OF_A_CHAT = (140.0, 0.55)  # median and sigma of the log-normal, at 512 tokens of width
SECONDS_BETWEEN_LOOKS = 0.05
SHOWN_MIB = 64  # a smaller change of what all hold makes no entry of its own
# Of the models that `write_model` makes
SHARE_OF_LAYERS = 0.1  # of what random layers add to a token, how much these add, all together
LOGIT_OF_NEXT_TOKEN = 10.0
SPECIAL_TOKENS = ("<unk>", "</s>", "<s>", "<|user|>", "<|assistant|>", "<|system|>", "<pad>", "<x>")


@dataclass(frozen=True)
class Case:
    """A model, how many iterations it is trained for, and how wide its batches are."""

    size: str
    iterations: int
    batch: int
    length: int

    @property
    def name(self) -> str:
        """As in `0.5B-300`."""
        return f"{self.size}-{self.iterations}"


CASES = {
    case.name: case
    for case in (
        Case("tiny", 20, 2, 64),
        Case("0.5B", 300, 4, 512),
        Case("3B", 100, 4, 1024),
        Case("3B", 1000, 4, 1024),
    )
}


def main() -> None:
    """Measure what is missing in the file, or print the table of what there is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("--cases", nargs="+", default=["0.5B-300", "3B-100"], choices=CASES)
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--times", type=int, default=3, help="runs of each program and case")
    parser.add_argument("--cold", action="store_true", help="with no kernel compiled before")
    parser.add_argument("--label", default="", help="what tells these rows from others")
    parser.add_argument("--seconds", type=float, default=3600, help="begin no run after so long")
    parser.add_argument("--folder", type=Path, default=Path("build/commands"))
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    if not arguments.report:
        end = time.monotonic() + arguments.seconds
        for case in (CASES[name] for name in arguments.cases):
            measure(case, arguments, end)
    for line in make_table(read_rows(arguments.rows)):
        print(line, flush=True)


def measure(case: Case, arguments: argparse.Namespace, end: float) -> None:
    """Append the runs of a case that are missing, as far as the time goes."""
    folder = write_inputs(arguments.folder, case)
    for turn in range(arguments.times):
        for program in arguments.programs:
            key = {"case": case.name, "program": program, "turn": turn}
            key |= {"cold": arguments.cold, "label": arguments.label}
            known = [{name: row[name] for name in key} for row in read_rows(arguments.rows)]
            if key in known or time.monotonic() > end:
                continue
            row = key | run(case, program, folder, is_cold=arguments.cold)
            with arguments.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            shown = {name: row[name] for name in (*key, "seconds", "cpu_seconds", "code")}
            print(json.dumps(shown), flush=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that were measured so far."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def run(case: Case, program: str, folder: Path, *, is_cold: bool) -> dict[str, Any]:
    """One run of one program, with the lines that it printed and when."""
    target = folder / f"out-{program.split()[0]}"
    shutil.rmtree(target, ignore_errors=True)
    kernels = folder.parent / "kernels" / program.split()[0]
    if is_cold:
        shutil.rmtree(kernels, ignore_errors=True)
    (kernels / "tmp").mkdir(parents=True, exist_ok=True)
    settings = ["-c", str(folder / "lora.yaml"), "--iters", str(case.iterations)]
    if program == PROGRAMS[0]:
        words = ["-m", "mlx_lm", "lora", "--train", *settings, "--adapter-path", str(target)]
    else:
        words = ["-m", "flows.cli", "train", *settings, "--run-dir", str(target)]
    environment = os.environ | {
        "TMPDIR": str(kernels / "tmp"),
        "XDG_CACHE_HOME": str(kernels / "cache"),
        "PYTHONUNBUFFERED": "1",
    }
    watch = MemoryWatch()
    row = run_command(words, environment)
    return row | {"device_bytes": watch.stop(), "case_of": asdict(case)}


def run_command(words: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run Python with these words: wall and CPU seconds, exit code, and when it printed each line.

    The CPU seconds are those of the process and of all that it waited for.
    """
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    lines: list[tuple[float, str]] = []
    with subprocess.Popen(
        [sys.executable, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            lines.append((round(time.monotonic() - began, 3), line.rstrip()))
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    row = {"seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3), "code": process.returncode}
    return row | {"lines": lines}


class MemoryWatch:
    """The most bytes that all processes together hold on a GPU, by NVML; 0 without one.

    What is held when the watch begins, by the driver and by the process that measures, is not
    counted.

    Attributes:
        seen: seconds since the watch began, MiB that all hold then, and MiB of each process, the
            largest first; an entry where all hold SHOWN_MIB more or less, or more than ever.
    """

    def __init__(self, gpu: int | None = None) -> None:
        """Begin to look at a GPU; by default at the first of CUDA_VISIBLE_DEVICES, or of all."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self._gpu = int(visible) if gpu is None else gpu
        self.seen: list[tuple[float, int, list[int]]] = []
        self._most = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            device = pynvml.nvmlDeviceGetHandleByIndex(self._gpu)
        except Exception:  # noqa: BLE001  # no NVIDIA GPU, or no library for one
            return
        began, last = time.monotonic(), 0
        before = int(pynvml.nvmlDeviceGetMemoryInfo(device).used)
        while not self._is_over.wait(SECONDS_BETWEEN_LOOKS):
            held = int(pynvml.nvmlDeviceGetMemoryInfo(device).used) - before
            if abs(held - last) >= SHOWN_MIB * 2**20 or held > self._most:
                processes = pynvml.nvmlDeviceGetComputeRunningProcesses(device)
                own = sorted(((one.usedGpuMemory or 0) // 2**20 for one in processes), reverse=True)
                self.seen.append((round(time.monotonic() - began, 2), held // 2**20, own))
                last = held
            self._most = max(self._most, held)

    def stop(self) -> int:
        """End the watch; the most that it saw."""
        self._is_over.set()
        self._thread.join()
        return self._most


def write_inputs(place: Path, case: Case) -> Path:
    """A folder with model, data and lora.yaml, made once."""
    shape = SHAPES[case.size]
    folder = place / f"{case.size}-{case.length}"
    if (folder / "lora.yaml").exists():
        return folder
    model = place / f"model-{case.size}"
    if not (model / "config.json").exists():
        write_model(model, shape)
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", TRAIN_ROWS, 0), ("valid", VALID_ROWS, 1)):
        with (data / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for chat in make_chats(shape.vocabulary, case.length, count, seed):
                file.write(json.dumps({"messages": chat}) + "\n")
    settings = {
        "model": str(model),
        "data": str(data),
        "train": True,
        "batch_size": case.batch,
        "max_seq_length": case.length,
        "num_layers": -1,
        "learning_rate": 1e-4,
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": KEYS},
    }
    (folder / "lora.yaml").write_text(json.dumps(settings, indent=1).replace("1e-", "1.0e-"))
    return folder


def make_chats(vocabulary: int, length: int, count: int, seed: int) -> Iterator[list[Any]]:
    """Chats of two turns whose words follow Zipf's law, log-normal in their lengths."""
    dice = np.random.default_rng(seed)
    median, sigma = WORDS_OF_A_CHAT
    words = vocabulary - len(SPECIAL_TOKENS)
    for _ in range(count):
        size = int(np.clip(dice.lognormal(np.log(median * length / 512 * 1.7), sigma), 8, length))
        drawn = np.minimum(dice.zipf(1.3, size) - 1, words - 1)
        text = [f"w{word}" for word in drawn]
        asked = max(2, size // 4)
        yield [
            {"role": "user", "content": " ".join(text[:asked])},
            {"role": "assistant", "content": " ".join(text[asked:])},
        ]


def write_model(folder: Path, shape: Shape) -> None:
    """Write a Llama of random bfloat16 weights with a tokenizer, as mlx_lm loads it.

    Its layers add little to the token that they get, and its output layer is the embedding moved by
    one row: the likeliest token is the next of the vocabulary, at a loss near that of chance. With
    weights that are random alone, a greedy answer is one token again and again, and the gate asks
    such a base nine sample prompts, where it asks a sound one three.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.models.llama import Model, ModelArgs

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    for layer in model.layers:
        for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
            output.weight = output.weight * (SHARE_OF_LAYERS / shape.layers)
    model.model.norm.weight = model.model.norm.weight * (LOGIT_OF_NEXT_TOKEN / shape.hidden**0.5)
    model.lm_head.weight = mx.roll(model.model.embed_tokens.weight, 1, axis=0)
    model.update(tree_map(lambda array: array.astype(mx.bfloat16), model.parameters()))
    weights: Any = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_tokenizer(folder, shape.vocabulary)
    (folder / "config.json").write_text(json.dumps(config))


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer of so many tokens: special ones, and the words w0, w1 and so on."""
    words = [f"w{index}" for index in range(vocabulary - len(SPECIAL_TOKENS))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": index,
                "content": name,
                "single_word": False,
                "lstrip": True,
                "rstrip": True,
                "normalized": False,
                "special": True,
            }
            for index, name in enumerate(SPECIAL_TOKENS)
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {name: index for index, name in enumerate((*SPECIAL_TOKENS, *words))},
            "unk_token": "<unk>",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "bos_token": "<s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "model_max_length": 4096,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def make_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line each case: medians of both programs, their ratio, CPU seconds and device memory."""
    keys = sorted({(row["case"], row["cold"], row["label"]) for row in rows})
    for key in keys:
        chosen = [row for row in rows if (row["case"], row["cold"], row["label"]) == key]
        figures = {}
        for program in PROGRAMS:
            own = [row for row in chosen if row["program"] == program and row["code"] == 0]
            if own:
                figures[program] = [
                    statistics.median(row[name] for row in own)
                    for name in ("seconds", "cpu_seconds", "device_bytes")
                ]
        shown = "; ".join(
            f"{program} {seconds:.1f} s ({cpu:.1f} CPU s, device {held / 2**30:.1f} GiB)"
            for program, (seconds, cpu, held) in figures.items()
        )
        ratio = ""
        if len(figures) == len(PROGRAMS):
            theirs, ours = (figures[program][0] for program in PROGRAMS)
            ratio = f": {ours / theirs:.2f} of mlx_lm.lora's time"
        yield f"{key[0]}{' cold' if key[1] else ''} {key[2]} {shown}{ratio}"


if __name__ == "__main__":
    main()
