"""What other trainers call our keys, so that a key of theirs is answered with ours.

Names from axolotl (docs/config-reference), LLaMA-Factory (hparams/*_args.py), TRL and transformers
(TrainingArguments, SFTConfig), PEFT (LoraConfig), unsloth (FastLanguageModel) and Soup
(soup_cli/config/schema.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from nested_core.config.error_messages import OtherTrainersKeys

_PACKING_HINT = "is not needed: batches of examples of similar length waste little (docs/data.md)"
_QUANTISED_BASE_HINT = "is not a key here: give a base model that is quantised (mlx_lm.convert -q)"
_ALL_LINEAR_LAYERS_HINT = (
    "is not a key here: without lora_parameters.keys every linear layer has an adapter"
)
_RSLORA_HINT = "is not a key here: give lora_parameters.scale as alpha / sqrt(rank)"
_HELD_OUT_SPLIT_HINT = (
    "is not a key here: put the held-out examples into valid.jsonl and test.jsonl, or draw them "
    "with `nested-tune init --split 0.1`"
)
_CHAT_TEMPLATE_HINT = "is not a key here: the tokenizer's own chat template is used"
_DECAY_HINT = "is in optimizer_config, such as optimizer_config: {adamw: {weight_decay: 0.01}}"
_OUTPUT_FOLDER_HINT = "is the flag --run-dir here; adapter_path copies the adapter to a folder too"

# Their key -> ours, with a remark behind it where the meaning differs.
# Our key, with a remark after "; " if the meaning differs: their keys for it.
_THEIRS_BY_OURS = {
    "model": ("base", "base_model", "model_name", "model_name_or_path", "model_id"),
    "data": ("dataset", "datasets", "dataset_path", "train_file"),
    "fine_tune_type": ("adapter", "finetuning_type"),
    "fine_tune_type; dora is one of its values": ("use_dora", "peft_use_dora"),
    "lora_parameters": ("lora",),
    "lora_parameters.rank": ("lora_r", "lora_rank", "r"),
    "lora_parameters.alpha; scale is alpha / rank, and alpha can be given in its place": (
        "lora_alpha",
    ),
    "lora_parameters.dropout": ("lora_dropout",),
    "lora_parameters.keys": ("lora_target_modules", "lora_target", "target_modules"),
    "num_layers": ("lora_layers",),
    "max_seq_length": ("sequence_len", "cutoff_len", "max_length", "model_max_length"),
    "batch_size": ("micro_batch_size", "per_device_train_batch_size"),
    "grad_accumulation_steps": ("gradient_accumulation_steps",),
    "grad_checkpoint": ("gradient_checkpointing", "use_gradient_checkpointing"),
    "training.epochs": ("num_epochs", "num_train_epochs"),
    "iters; it counts micro-batches, theirs counts optimizer steps": ("max_steps",),
    "learning_rate": ("lr",),
    "lr_schedule": ("lr_scheduler", "scheduler", "lr_scheduler_type"),
    "optimizer": ("optim",),
    "training.warmup_steps; the ratio times the number of optimizer steps": ("warmup_ratio",),
    "training.precision": ("bf16", "fp16"),
    "training.early_stop_patience": ("early_stopping_patience",),
    "steps_per_report": ("logging_steps",),
    "steps_per_eval": ("eval_steps",),
    "save_every": ("save_steps",),
    "training.keep_checkpoints": ("save_total_limit",),
    "seed": ("random_state",),
    "training.supervise; all trains on every answer of a chat, where theirs is false": (
        "train_on_inputs",
    ),
    "training.supervise; all trains on every answer of a chat": (
        "train_on_responses_only",
        "assistant_only_loss",
        "roles_to_train",
    ),
    "mask_prompt; both train on the last answer of a chat alone": ("mask_history",),
    "mask_prompt; of chats, which have several answers, the last one": ("completion_only_loss",),
    "text_feature": ("dataset_text_field",),
    "project_name": ("wandb_project",),
}

# What holds in place of a key of theirs that has none here: their keys.
_THEIRS_BY_HINT = {
    _PACKING_HINT: ("sample_packing", "packing", "pad_to_sequence_len"),
    _QUANTISED_BASE_HINT: ("load_in_4bit", "load_in_8bit", "quantization"),
    _ALL_LINEAR_LAYERS_HINT: ("lora_target_linear",),
    _RSLORA_HINT: ("use_rslora",),
    _HELD_OUT_SPLIT_HINT: ("val_set_size", "val_size", "val_split"),
    _CHAT_TEMPLATE_HINT: ("template", "chat_template"),
    _DECAY_HINT: ("weight_decay",),
    _OUTPUT_FOLDER_HINT: ("output_dir", "output"),
    "is the flag -c; a file does not name another, and mlx_lm.lora passes it over": ("config",),
}


def _by_their_key(theirs_by_answer: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {key: answer for answer, keys in theirs_by_answer.items() for key in keys}


KEYS = OtherTrainersKeys(_by_their_key(_THEIRS_BY_OURS), _by_their_key(_THEIRS_BY_HINT))
