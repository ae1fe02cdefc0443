"""What other trainers call our keys, so that a key of theirs is answered with ours.

Names from axolotl (docs/config-reference), LLaMA-Factory (hparams/*_args.py), TRL and transformers
(TrainingArguments, SFTConfig), PEFT (LoraConfig), unsloth (FastLanguageModel) and Soup
(soup_cli/config/schema.py).
"""

from __future__ import annotations

from nested_core.config.error_messages import OtherTrainersKeys

_SCALE_HINT = "; scale is alpha / rank, and alpha can be given in its place"
_ITERS_HINT = "; it counts micro-batches, theirs counts optimizer steps"
_EVERY_ANSWER_HINT = "; all trains on every answer of a chat"
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
_WEIGHT_DECAY_HINT = (
    "is in optimizer_config, such as optimizer_config: {adamw: {weight_decay: 0.01}}"
)
_OUTPUT_FOLDER_HINT = "is the flag --run-dir here; adapter_path copies the adapter to a folder too"

# Their key -> ours, with a remark behind it where the meaning differs.
_OUR_KEYS = {
    "base": "model",
    "base_model": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "model_id": "model",
    "dataset": "data",
    "datasets": "data",
    "dataset_path": "data",
    "train_file": "data",
    "adapter": "fine_tune_type",
    "finetuning_type": "fine_tune_type",
    "use_dora": "fine_tune_type; dora is one of its values",
    "peft_use_dora": "fine_tune_type; dora is one of its values",
    "lora": "lora_parameters",
    "lora_r": "lora_parameters.rank",
    "lora_rank": "lora_parameters.rank",
    "r": "lora_parameters.rank",
    "lora_alpha": f"lora_parameters.alpha{_SCALE_HINT}",
    "lora_dropout": "lora_parameters.dropout",
    "lora_target_modules": "lora_parameters.keys",
    "lora_target": "lora_parameters.keys",
    "target_modules": "lora_parameters.keys",
    "lora_layers": "num_layers",
    "sequence_len": "max_seq_length",
    "cutoff_len": "max_seq_length",
    "max_length": "max_seq_length",
    "model_max_length": "max_seq_length",
    "micro_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accumulation_steps",
    "gradient_checkpointing": "grad_checkpoint",
    "use_gradient_checkpointing": "grad_checkpoint",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "max_steps": f"iters{_ITERS_HINT}",
    "lr": "learning_rate",
    "lr_scheduler": "lr_schedule",
    "scheduler": "lr_schedule",
    "lr_scheduler_type": "lr_schedule",
    "optim": "optimizer",
    "warmup_ratio": "training.warmup_steps; the ratio times the number of optimizer steps",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "early_stopping_patience": "training.early_stop_patience",
    "logging_steps": "steps_per_report",
    "eval_steps": "steps_per_eval",
    "save_steps": "save_every",
    "save_total_limit": "training.keep_checkpoints",
    "random_state": "seed",
    "train_on_inputs": f"training.supervise{_EVERY_ANSWER_HINT}, where theirs is false",
    "train_on_responses_only": f"training.supervise{_EVERY_ANSWER_HINT}",
    "assistant_only_loss": f"training.supervise{_EVERY_ANSWER_HINT}",
    "roles_to_train": f"training.supervise{_EVERY_ANSWER_HINT}",
    "mask_history": "mask_prompt; both train on the last answer of a chat alone",
    "completion_only_loss": "mask_prompt; of chats, which have several answers, the last one",
    "dataset_text_field": "text_feature",
    "wandb_project": "project_name",
}

# Their key -> what holds in its place.
_HINTS = {
    "sample_packing": _PACKING_HINT,
    "packing": _PACKING_HINT,
    "pad_to_sequence_len": _PACKING_HINT,
    "load_in_4bit": _QUANTISED_BASE_HINT,
    "load_in_8bit": _QUANTISED_BASE_HINT,
    "quantization": _QUANTISED_BASE_HINT,
    "lora_target_linear": _ALL_LINEAR_LAYERS_HINT,
    "use_rslora": _RSLORA_HINT,
    "val_set_size": _HELD_OUT_SPLIT_HINT,
    "val_size": _HELD_OUT_SPLIT_HINT,
    "val_split": _HELD_OUT_SPLIT_HINT,
    "template": _CHAT_TEMPLATE_HINT,
    "chat_template": _CHAT_TEMPLATE_HINT,
    "weight_decay": _WEIGHT_DECAY_HINT,
    "output_dir": _OUTPUT_FOLDER_HINT,
    "output": _OUTPUT_FOLDER_HINT,
    "config": "is the flag -c; a file does not name another, and mlx_lm.lora passes it over",
}

KEYS = OtherTrainersKeys(_OUR_KEYS, _HINTS)
