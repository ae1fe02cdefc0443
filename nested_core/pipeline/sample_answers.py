"""What base and adapter answer to a few prompts at the end of a run, for a person to read.

The prompts are those of `samples`, or without any three of the held-out data. It costs a load of
the base model and the answers; nothing rests on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.data.data_settings import DataSettings
from nested_core.data.held_out_prompts import read_held_out_prompts
from nested_core.gate.held_out_loss import LoadedBase
from nested_core.models.generation import Sampling, answer_prompts, encode_messages
from nested_core.models.lora_attachment import load_adapter_tensors
from nested_core.pipeline.device_lock import OnWait, locking_devices
from nested_core.storage.adapter import read_adapter
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.sample_answers_file import SampleAnswers, write_sample_answers
from nested_core.text.stages import stages

HELD_OUT_PROMPT_COUNT = 3


def answer_samples(
    config: FineTuneConfig, run: RunDirectory, on_wait: OnWait | None = None
) -> list[SampleAnswers]:
    """Ask the base and the run's adapter, and write RUN_DIR/sample-answers.jsonl.

    Empty for data without prompts. Greedy, at most `training.sample_tokens` tokens an answer.
    """
    prompts: Sequence[tuple[Sequence[Mapping[str, Any]], str, str | None, str]]
    prompts = [([{"role": "user", "content": p}], p, None, "samples") for p in config.samples]
    if not prompts:
        held_out = read_held_out_prompts(DataSettings.from_config(config), HELD_OUT_PROMPT_COUNT)
        prompts = [(p.messages, p.text, p.expected, f"{p.file}:{p.line}") for p in held_out]
    if not prompts:
        return []
    stages.info(f"samples: {len(prompts)} prompts, answered by the base and by the adapter")
    with locking_devices(on_wait):
        base = LoadedBase.load(config)
        base.model.eval()
        encoded = [encode_messages(base.tokenizer, messages) for messages, *_ in prompts]

        def ask(adapter: Path | None) -> list[str]:
            """The answers with an adapter; None is the base alone."""
            tensors = base.parameters
            if adapter is not None:
                read = read_adapter(adapter).tensors
                tensors = {name: tensor.to_mlx() for name, tensor in read.items()}
            load_adapter_tensors(base.model, tensors)
            sampling = Sampling(config.training.sample_tokens)
            answers = answer_prompts(base.model, base.tokenizer, encoded, sampling)
            return [answer.text.strip() for answer in answers]

        of_base = ask(None)
        has_parent = config.resume_adapter_file is not None or config.continual.start is not None
        of_parent = ask(run.initial) if has_parent else [None] * len(prompts)
        of_adapter = ask(run.adapter)
    rows = [
        SampleAnswers(text, expected, base_answer, parent, adapter, place)
        for (_, text, expected, place), base_answer, parent, adapter in zip(
            prompts, of_base, of_parent, of_adapter, strict=True
        )
    ]
    run.require_lock()
    write_sample_answers(run.sample_answers, rows)
    return rows
