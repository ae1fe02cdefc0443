"""What the Prefect UI's form says beside each field of a fine-tune.

The configuration itself is nested_core's and knows of no form. A field without a word here is found
by a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import GetJsonSchemaHandler

DESCRIPTIONS: dict[str, str] = {
    "model": "the base model: a folder, or a repository of the Hugging Face hub",
    "train": "implied; a flow always trains",
    "fine_tune_type": "lora, dora, or full: every weight of the chosen layers",
    "optimizer": "adam and adamw keep the clocks of tiers; the others train all at one pace",
    "optimizer_config": "keyword arguments for each optimizer by name, as in mlx-lm",
    "data": "a folder with train.jsonl and valid.jsonl, or a data set of the hub",
    "seed": "of the random numbers; the same seed gives the same run",
    "num_layers": "how many of the last layers are trained; -1 is all",
    "batch_size": "examples in a micro-batch",
    "iters": "micro-batches to train on",
    "val_batches": "validation batches at each evaluation; -1 is all, 0 is none",
    "learning_rate": "of the optimizer, before schedule and warm-up",
    "steps_per_report": "iterations between two training losses in metrics.jsonl",
    "steps_per_eval": "iterations between two evaluations",
    "resume_adapter_file": "start from this adapters.safetensors instead of a fresh adapter",
    "adapter_path": "copy the adapter to this folder too",
    "save_every": "iterations between two checkpoints: what a crash can cost at most",
    "test": "compute the loss on test.jsonl at the end",
    "test_batches": "batches of that loss; -1 is all",
    "max_seq_length": "longer examples are cut here, or refused: data_policy",
    "grad_checkpoint": "compute layers again in the backward pass: less memory, more time",
    "grad_accumulation_steps": "micro-batches whose gradients make one step",
    "clear_cache_threshold": "bytes of MLX's cache above which it is emptied; 0 is never",
    "lr_schedule": "mlx-lm's schedule of the learning rate",
    "lora_parameters": "rank, scale, dropout and the layers that get an adapter",
    "mask_prompt": "learn the answers alone",
    "report_to": "wandb or swanlab",
    "project_name": "the project there",
    "trust_remote_code": "run code that comes with the model: only for models you trust as code",
    "prompt_feature": "the key of the prompt in a row",
    "completion_feature": "the key of the completion in a row",
    "text_feature": "the key of plain text in a row",
    "chat_feature": "the key of the messages in a row",
    "hf_dataset": "data sets of the hub with their splits, as in mlx-lm",
    "nested": "tiers of parameters, each updated at a pace of its own",
    "training": "clipping, warm-up, early stop, precision",
    "data_policy": "what becomes of overlong, repeated and held-out examples",
    "gate": "the bounds that the trained adapter is judged by",
    "registry": "where a verified adapter goes, and whether it becomes champion by itself",
    "continual": "whether to go on from the champion, and to skip unchanged data",
    "Assignment.match": "a regular expression over parameter names",
    "Assignment.tier": "the tier that they go to; 0 is the fastest",
    "ContinualSection.from": "champion: start from the registry's champion",
    "ContinualSection.skip_unchanged": "end before training where data and settings are the same",
    "DataPolicy.overlong": "examples above max_seq_length",
    "DataPolicy.duplicates": "examples that come twice",
    "DataPolicy.leakage": "training examples that are held-out ones too",
    "GateSection.max_val_loss_increase": "relative, against the initial adapter",
    "GateSection.min_relative_change": "the least that a tensor must have moved",
    "GateSection.max_skipped_share": "of a tier's updates, skipped for non-finite gradients",
    "GateSection.general_data": "text that the adapter must not forget: JSON Lines",
    "GateSection.max_general_loss_increase": "relative, on that text",
    "GateSection.check_fused": "judge the adapter fused into the base model too",
    "HubDataset.path": "the data set's name on the hub",
    "HubDataset.config": "keyword arguments for loading it",
    "HubDataset.train_split": "such as train[:90%]",
    "HubDataset.valid_split": "such as train[-10%:]",
    "HubDataset.test_split": "a split to test on",
    "HubDataset.prompt_feature": "the key of the prompt in a row",
    "HubDataset.completion_feature": "the key of the completion in a row",
    "HubDataset.text_feature": "the key of plain text in a row",
    "HubDataset.chat_feature": "the key of the messages in a row",
    "LearningRateSchedule.name": "a schedule of mlx.optimizers",
    "LearningRateSchedule.arguments": "its arguments, in order",
    "LearningRateSchedule.warmup": "steps of warm-up before it",
    "LearningRateSchedule.warmup_init": "the learning rate that the warm-up starts from",
    "LoraParameters.rank": "of the two factors",
    "LoraParameters.dropout": "share of inputs left out in training",
    "LoraParameters.scale": "what the product of the factors is multiplied by",
    "LoraParameters.keys": "names of the layers that get an adapter; empty: all linear ones",
    "LoraParameters.alpha": "scale times rank, for those who write it so",
    "NestedSection.frequencies": "one a tier, ascending: a tier is updated every so many steps",
    "NestedSection.strategy": "what decides a parameter's tier",
    "NestedSection.fast": "the end of the model that is updated at every step",
    "NestedSection.slow_gradients": "not computed when not due, or gathered until due",
    "NestedSection.accumulate": "what becomes of gathered gradients",
    "NestedSection.learning_rate_scale": "one number a tier; none is 1 each",
    "NestedSection.weight_decay": "one number a tier; none is the optimizer's",
    "NestedSection.assignments": "for the strategy manual; the first match wins",
    "NestedSection.probe_batches": "for the strategy parameter_importance",
    "RegistrySection.path": "the registry's folder, on the worker's machine",
    "RegistrySection.name": "the adapter's name in it",
    "RegistrySection.promote": "better: than the champion, on the same validation data",
    "RegistrySection.min_improvement": "for better: by how much",
    "RegistrySection.require_validation": "promote nothing that was not validated",
    "TrainingSection.max_grad_norm": "gradients are clipped to this norm; 0 is off",
    "TrainingSection.warmup_steps": "optimizer steps until the full learning rate",
    "TrainingSection.epochs": "passes over the data, in place of iters",
    "TrainingSection.supervise": "the last turn of the assistant, or all of them",
    "TrainingSection.early_stop_patience": "evaluations without improvement until it ends",
    "TrainingSection.min_delta": "the least that counts as improvement",
    "TrainingSection.keep_checkpoints": "the best and the last are always kept",
    "TrainingSection.precision": "of the forward and backward pass",
    "TrainingSection.memory_limit_gb": "of the device's memory",
    "TrainingSection.max_nonfinite_steps": "in a row, until it ends as diverged",
    "TrainingSection.flat_loss_reports": "warn where the loss has not moved for so many",
    "TrainingSection.processes": "ranks that share each batch, on this machine; 1 is none",
    "TrainingSection.hostfile": "in place of processes: mlx.launch's list of machines",
    "TrainingSection.reference": "mlx_lm: do what mlx_lm.lora does, bit for bit",
}


def describe_fields(schema: dict[str, Any], handler: GetJsonSchemaHandler) -> dict[str, Any]:
    """Put the descriptions into the JSON schema of a model, and of the sections in it."""
    resolved = handler.resolve_ref_schema(schema)
    for name, described in resolved.get("properties", {}).items():
        word = DESCRIPTIONS.get(f"{resolved['title']}.{name}") or DESCRIPTIONS.get(name)
        if word is not None:
            described.setdefault("description", word)
        for reference in _references(described):
            describe_fields(reference, handler)
    return schema


def _references(schema: Any) -> Iterator[dict[str, Any]]:
    """Every {"$ref": ...} in a schema; what stands in its default is no schema."""
    if isinstance(schema, list):
        for each in schema:
            yield from _references(each)
    elif isinstance(schema, dict):
        if "$ref" in schema:
            yield {"$ref": schema["$ref"]}
        for key, value in schema.items():
            if key != "default":
                yield from _references(value)
