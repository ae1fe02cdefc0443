"""Configurations that people bring from mlx_lm.lora, and what becomes of each key and flag here.

tests/flows/test_mlx_lm_variants.py runs them through both programs; the tables in
docs/coming-from.md are made from them by `make docs`. `$name` stands for a path that
tests/mlx_lm_stand_ins.py makes. `EXAMPLE` and `DOCUMENTED` have the keys and values of mlx-lm's
examples/lora_config.yaml and LORA.md (ml-explore/mlx-lm, MIT).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from nested_core.seams import is_there

# same: as in mlx_lm.lora; better: taken, and more is done or less is wrong; refused: exit code 2.
Relation = Literal["same", "better", "refused"]

# The file of each variant but those that are `whole`, less the keys that the variant gives itself.
COMMON = """\
model: $base
data: $chats
train: true
num_layers: 2
batch_size: 2
iters: 4
val_batches: 1
learning_rate: 1e-3
steps_per_report: 2
steps_per_eval: 2
save_every: 2
adapter_path: adapters
"""


@dataclass(frozen=True)
class Variant:
    """A lora.yaml or a command line, and what it shows.

    Attributes:
        name: what it is called in tests and in the docs.
        shows: one phrase, for the docs.
        yaml: the lines of the file beyond COMMON's.
        flags: words of the command line beyond `-c FILE`.
        whole: whether `yaml` is the whole file.
        without: a key of COMMON that the file leaves out.
        relation: what becomes of it here.
        code: the exit code here.
        here: part of our message, where it is refused.
        there: part of the error that mlx_lm.lora ends with; "" where it trains.
        needs: a module that not every checkout has.
    """

    name: str
    shows: str
    yaml: str = ""
    flags: tuple[str, ...] = ()
    whole: bool = False
    without: str = ""
    relation: Relation = "same"
    code: int = 0
    here: str = ""
    there: str = ""
    needs: str = ""

    def file(self) -> str:
        """The text of its lora.yaml."""
        if self.whole:
            return self.yaml
        own = {line.partition(":")[0] for line in self.yaml.splitlines()} | {self.without}
        common = [line for line in COMMON.splitlines() if line.partition(":")[0] not in own]
        return "".join(f"{line}\n" for line in common) + self.yaml


EXAMPLE = """\
model: "mlx-community/Llama-3.2-1B-Instruct-bf16"
train: true
fine_tune_type: lora
optimizer: adamw
data: "mlx-community/WikiSQL"
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
grad_accumulation_steps: 1
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
"""
EXAMPLE_FLAGS = ("--model", "$deep", "--data", "$chats", "--iters", "4", "--save-every", "3")
COMMENTED_OUT = """\
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    weight_decay: 0.05
    bias_correction: true
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
"""
SCHEDULE = "lr_schedule: {{name: {}, arguments: {}}}\n"

EXAMPLES = (
    Variant(
        "lora_config.yaml",
        "mlx-lm's example file; flags win over it",
        EXAMPLE,
        flags=EXAMPLE_FLAGS,
        whole=True,
    ),
    Variant(
        "lora_config.yaml, schedule",
        "the same with its commented-out optimizer_config and lr_schedule",
        EXAMPLE + COMMENTED_OUT,
        flags=EXAMPLE_FLAGS,
        whole=True,
    ),
    Variant(
        "lora_config.yaml, wandb",
        "the same with its commented-out report_to and project_name",
        EXAMPLE + "report_to: wandb\nproject_name: capitals\n",
        flags=EXAMPLE_FLAGS,
        whole=True,
    ),
    Variant(
        "lora_config.yaml, hub",
        "the same with its commented-out hf_dataset",
        EXAMPLE
        + "hf_dataset:\n  path: $questions\n  train_split: 'train[:8]'\n"
        + "  valid_split: 'train[-4:]'\n  prompt_feature: text\n  completion_feature: summary\n"
        + "  config: {cache_dir: $cache}\n",
        flags=(*EXAMPLE_FLAGS[:2], *EXAMPLE_FLAGS[4:]),
        whole=True,
        needs="datasets",
    ),
    Variant(
        "LORA.md, features",
        "the documented keys for prompts and completions of another name",
        "data: $renamed\nprompt_feature: input\ncompletion_feature: output\n",
    ),
    Variant(
        "LORA.md, two data sets",
        "the documented list of data sets",
        "hf_dataset:\n"
        "- {path: $questions, train_split: 'train[:90%]', valid_split: 'train[-10%:]',\n"
        "   prompt_feature: text, completion_feature: summary, config: {cache_dir: $cache}}\n"
        "- {path: $conversations, train_split: 'train[:90%]', valid_split: 'train[-10%:]',\n"
        "   chat_feature: chosen, config: {cache_dir: $cache}}\n",
        needs="datasets",
    ),
    Variant(
        "LORA.md, text of the hub",
        "a data set of texts, with its split for testing",
        "test: true\nhf_dataset: {path: $bodies, train_split: train, test_split: test,\n"
        "  valid_split: validation, text_feature: body, config: {cache_dir: $cache}}\n",
        needs="datasets",
    ),
    Variant(
        "LORA.md, little memory",
        "the documented command for little memory; all else as by default",
        "model: $base\n",
        flags=(
            *("--train", "--batch-size", "1", "--num-layers", "2", "--data", "$chats"),
            *("--iters", "2", "--adapter-path", "adapters"),
        ),
        whole=True,
    ),
)

TRAINED = (
    Variant("plain", "the smallest file: model, data, length and snapshots"),
    Variant(
        "dora",
        "DoRA, with its magnitudes",
        "fine_tune_type: dora\nlora_parameters: {rank: 4, scale: 2.0, dropout: 0.0}\n",
    ),
    Variant("full", "weights of one layer", "fine_tune_type: full\nnum_layers: 1\n"),
    Variant("quantised", "QLoRA: a base of 4 bits", "model: $quantised\n"),
    Variant(
        "adamw",
        "an optimizer with arguments",
        "optimizer: adamw\noptimizer_config: {adamw: {weight_decay: 0.1, betas: [0.9, 0.95]}}\n",
    ),
    Variant(
        "sgd", "sgd with momentum", "optimizer: sgd\noptimizer_config: {sgd: {momentum: 0.9}}\n"
    ),
    Variant("muon", "muon", "optimizer: muon\n"),
    Variant("adafactor", "adafactor", "optimizer: adafactor\n"),
    Variant(
        "optimizer in capitals",
        "a name in capitals, which mlx_lm.lora takes in a file",
        "optimizer: AdamW\noptimizer_config: {adamw: {weight_decay: 0.1}}\n",
    ),
    Variant(
        "cosine",
        "a schedule with its warm-up",
        "lr_schedule:\n  name: cosine_decay\n  warmup: 2\n  warmup_init: 1e-7\n"
        "  arguments: [1e-3, 4, 1e-5]\n",
    ),
    Variant("linear", "linear_schedule", SCHEDULE.format("linear_schedule", "[1e-3, 1e-4, 4]")),
    Variant(
        "exponential", "exponential_decay", SCHEDULE.format("exponential_decay", "[1e-3, 0.9]")
    ),
    Variant("steps", "step_decay", SCHEDULE.format("step_decay", "[1e-3, 0.5, 2]")),
    Variant(
        "accumulation",
        "snapshots 3 and 6: the first is within an update, and has the weights before it",
        "iters: 8\ngrad_accumulation_steps: 2\nsave_every: 3\n",
    ),
    Variant(
        "accumulation, every iteration",
        "four snapshots of a single update",
        "iters: 4\ngrad_accumulation_steps: 4\nsave_every: 1\n",
    ),
    Variant(
        "accumulation, remainder",
        "a last update of one micro-batch, which mlx_lm.lora leaves out",
        "iters: 5\ngrad_accumulation_steps: 2\nsave_every: 5\n",
        relation="better",
    ),
    Variant("every iteration", "a snapshot each iteration", "save_every: 1\n"),
    Variant("no snapshot", "save_every above iters", "save_every: 9\n"),
    Variant(
        "last one is no snapshot",
        "iters that are no multiple of save_every: snapshot 3 alone",
        "iters: 5\nsave_every: 3\n",
    ),
    Variant("mask_prompt", "answers alone are trained on", "mask_prompt: true\n"),
    Variant("completions", "prompts and completions", "data: $completions\nmask_prompt: true\n"),
    Variant("texts", "plain text", "data: $texts\n"),
    Variant("text_feature", "plain text under another key", "data: $bodies\ntext_feature: body\n"),
    Variant(
        "chat_feature", "chats under another key", "data: $dialogues\nchat_feature: dialogue\n"
    ),
    Variant("tools", "chats that call tools", "data: $tools\n"),
    Variant(
        "grad_checkpoint",
        "recomputed layers, same loss; with dropout mlx_lm.lora takes the gradient under "
        "other masks than the loss",
        "grad_checkpoint: true\n",
    ),
    Variant("all layers", "-1 is every layer", "num_layers: -1\n"),
    Variant("0 layers", "0 is every layer too", "num_layers: 0\n"),
    Variant(
        "keys",
        "chosen modules; a whole number as scale; dropout",
        "lora_parameters:\n  keys: [self_attn.q_proj, mlp.down_proj]\n"
        "  rank: 2\n  scale: 4\n  dropout: 0.1\n",
    ),
    Variant(
        "embeddings",
        "a module outside of the layers",
        "lora_parameters: {rank: 2, scale: 2.0, dropout: 0.0, keys: [model.embed_tokens]}\n",
    ),
    Variant(
        "from an adapter",
        "training goes on from an adapters.safetensors",
        "resume_adapter_file: $adapter\n",
    ),
    Variant("seed", "another seed", "seed: 7\n"),
    Variant(
        "whole evaluations",
        "-1 is the whole validation and test set",
        "val_batches: -1\ntest: true\ntest_batches: -1\n",
    ),
    Variant("test", "the loss on test.jsonl at the end", "test: true\ntest_batches: 1\n"),
    Variant("truncated", "examples longer than max_seq_length", "max_seq_length: 12\n"),
    Variant("no valid.jsonl", "training without validation", "data: $only_train\n"),
    Variant(
        "words of YAML",
        "yes, on and no; an exponent; null is the default",
        "train: yes\nmask_prompt: on\ngrad_checkpoint: no\nlearning_rate: 1.0E-3\n"
        "resume_adapter_file: ~\nlr_schedule: null\n",
    ),
    Variant(
        "mlx_lm's own adapter_config.json",
        "the adapter_config.json that it wrote, without the key config",
        '{"adapter_path": "adapters", "batch_size": 2, "data": "$chats", "fine_tune_type": '
        '"lora", "iters": 4, "learning_rate": 1e-03, "lora_parameters": {"dropout": 0.0, "rank": '
        '8, "scale": 20.0}, "lr_schedule": null, "model": "$base", "num_layers": 2, "optimizer": '
        '"adam", "optimizer_config": {"adafactor": {}, "adam": {}, "adamw": {}, "muon": {}, "sgd": '
        '{}}, "report_to": null, "save_every": 2, "train": true, "val_batches": 1}\n',
        whole=True,
    ),
    Variant("underscore", "a number of YAML 1.1, which is 10", "iters: 1_0\n"),
    Variant(
        "clear_cache_threshold",
        "mlx_lm.lora takes it from the flag alone",
        "clear_cache_threshold: 1000000\n",
        relation="better",
    ),
    Variant(
        "trust_remote_code",
        "mlx_lm.lora takes it from the flag alone, and refuses the model",
        "model: $own_code\ntrust_remote_code: true\n",
        relation="better",
        there="trust_remote_code",
    ),
    Variant(
        "rank alone",
        "what is left out of lora_parameters has its default",
        "lora_parameters: {rank: 4}\n",
        relation="better",
        there="missing required key 'scale'",
    ),
    Variant(
        "alpha",
        "PEFT's alpha in place of scale",
        "lora_parameters: {rank: 4, alpha: 8, dropout: 0.0}\n",
        relation="better",
        there="missing required key 'scale'",
    ),
    Variant(
        "val_batches 0",
        "no validation, where mlx_lm.lora divides by zero tokens",
        "val_batches: 0\n",
        relation="better",
    ),
    Variant(
        "train left out",
        "the command trains without being told",
        without="train",
        relation="better",
        there="at least one of --train or --test",
    ),
)


def _refused(name: str, shows: str, yaml: str, here: str, code: int = 2, **fields: Any) -> Variant:
    """A variant that ends in an error here."""
    return Variant(name, shows, yaml, relation="refused", code=code, here=here, **fields)


REFUSED = (
    _refused(
        "typo",
        "a key that mlx_lm.lora passes over",
        "learning-rate: 1e-3\n",
        "learning-rate: unknown key; did you mean learning_rate? (line 13)",
    ),
    _refused(
        "lora_layers",
        "a key of earlier mlx-lm, which it passes over now",
        "lora_layers: 2\n",
        "lora_layers: unknown key" + "; did you mean num_layers?" * is_there("other_trainers"),
    ),
    _refused(
        "alpha and scale",
        "two values for one number, of which mlx_lm.lora takes scale",
        "lora_parameters: {rank: 8, alpha: 16, scale: 10.0, dropout: 0.0}\n",
        "alpha and scale say the same thing",
    ),
    _refused(
        "config in the file",
        "a file within a file, which mlx_lm.lora passes over",
        "config: other.yaml\n",
        "config: unknown key" + "; config is the flag -c" * is_there("other_trainers"),
    ),
    _refused(
        "anchor",
        "YAML by reference",
        "data: &data $chats\n",
        "an anchor or alias (& or *) is not allowed here",
    ),
    _refused(
        "key twice",
        "a key given twice, of which mlx_lm.lora takes the last",
        "seed: 1\nseed: 2\n",
        "the key 'seed', which is in line 13 too, is not allowed here",
    ),
    _refused(
        "octal", "8 to some readers and 10 to others", "seed: 010\n", "is octal to some readers"
    ),
    _refused(
        "rate 0",
        "a training that changes nothing",
        "learning_rate: 0\n",
        "learning_rate: Input should be greater than 0",
    ),
    _refused(
        "save_every 0",
        "a division by zero there",
        "save_every: 0\n",
        "save_every: should be greater than 0 and below 2**31",
        there="ZeroDivisionError",
    ),
    _refused(
        "too many layers",
        "more layers than the model has",
        "num_layers: 3\n",
        "num_layers: 3 layers",
        there="Requested to train 3 layers",
    ),
    _refused(
        "arguments",
        "an argument that the optimizer does not take",
        "optimizer_config: {adam: {weight_decay: 0.1}}\n",
        "optimizer_config.adam does not take ['weight_decay']",
        there="unexpected keyword argument 'weight_decay'",
    ),
    _refused(
        "masked text",
        "plain text has no prompt to mask",
        "data: $texts\nmask_prompt: true\n",
        "mask_prompt needs prompts; plain text has none",
        code=3,
        there="Prompt masking not supported for text dataset",
    ),
    _refused(
        "few examples",
        "a batch larger than the data set",
        "batch_size: 16\nval_batches: -1\n",
        "it holds 12 of the 16 rows that fill one batch; lower batch_size",
        code=3,
        there="must have at least batch_size=16",
    ),
    _refused(
        "keys of nothing",
        "names that no module has",
        "lora_parameters: {rank: 2, scale: 2.0, dropout: 0.0, keys: [q_proj]}\n",
        "nothing would be trained. No module is named q_proj",
        there="Must specify at least one argument",
    ),
    _refused(
        "no model",
        "mlx_lm.lora's default model would be fetched from the hub",
        "model: null\n",
        "No model given",
        there="Cannot find an appropriate cached snapshot",
    ),
    _refused(
        "no data",
        "its default data set, too",
        "data: null\n",
        "No data given",
        there="mlx-community/WikiSQL",
    ),
    _refused(
        "service not installed",
        "a service whose client is not there",
        "report_to: swanlab\n",
        "report_to: swanlab is not installed" if is_there("services") else "the room services",
        there="swanlab is not installed",
    ),
)

# Each flag of mlx_lm.lora's parser by itself, beside a file that has the other keys.
_FLAGS = """
--model $base; --train; --data $completions; --fine-tune-type dora; --optimizer adamw
--mask-prompt; --num-layers 1; --batch-size 3; --iters 2; --val-batches 2
--learning-rate 1e-4; --steps-per-report 1; --steps-per-eval 3; --grad-accumulation-steps 2
--resume-adapter-file $adapter; --adapter-path elsewhere; --save-every 3; --test
--test-batches 1; --max-seq-length 16; -c $other; --config $other; --grad-checkpoint
--clear-cache-threshold 1MB; --report-to wandb; --project-name capitals; --seed 5
--trust-remote-code
"""
FLAGS = MappingProxyType(
    {
        words[0]: words
        for part in _FLAGS.replace("\n", ";").split(";")
        if (words := tuple(part.split()))
    }
)


def flag_variants() -> tuple[Variant, ...]:
    """A variant for each flag, on a file without its key; -c has no other file beside it."""
    return tuple(
        Variant(
            name=flag,
            shows=f"{flag} alone",
            flags=words,
            without=flag.removeprefix("--").replace("-", "_"),
        )
        for flag, words in FLAGS.items()
    )


# What becomes of each key of mlx_lm.lora, and of its flag where it has one.
KEYS: MappingProxyType[str, tuple[Relation, str]] = MappingProxyType(
    {
        "model": ("same", "has to be given: no default is fetched from the hub"),
        "train": ("same", "implied by `train` and `run`"),
        "fine_tune_type": ("same", ""),
        "optimizer": ("better", "any optimizer of mlx, not five"),
        "optimizer_config": ("better", "an unknown argument is refused before the model is loaded"),
        "data": ("same", "has to be given too"),
        "seed": ("same", "the same seed gives the same run, not mlx_lm.lora's numbers"),
        "num_layers": ("same", ""),
        "batch_size": ("same", "larger than the data set is refused, as there"),
        "iters": ("better", "a last update of fewer micro-batches is applied"),
        "val_batches": ("better", "the same batches at each evaluation; 0 is none"),
        "learning_rate": ("same", "0 is refused"),
        "steps_per_report": ("same", "with accumulation, after the update that is due"),
        "steps_per_eval": ("better", "evaluations follow the iteration that they are named after"),
        "resume_adapter_file": ("better", "refused, with the names, where tensors do not fit"),
        "adapter_path": (
            "better",
            "snapshots as there; adapters.safetensors is the best by validation loss. Left out, "
            "the adapter is in the run directory alone",
        ),
        "save_every": ("same", "a snapshot within an update has the weights before it, as there"),
        "test": ("same", "after training: without `train`, mlx_lm.lora would only evaluate"),
        "test_batches": ("same", ""),
        "max_seq_length": ("same", ""),
        "config": ("same", "the flag `-c`; as a key in the file it is refused"),
        "grad_checkpoint": ("same", ""),
        "grad_accumulation_steps": ("same", ""),
        "clear_cache_threshold": ("better", "counts in the file too"),
        "lr_schedule": ("same", ""),
        "lr_schedule.name": ("same", "one of the four that take numbers"),
        "lr_schedule.arguments": ("same", ""),
        "lr_schedule.warmup": ("same", ""),
        "lr_schedule.warmup_init": ("same", ""),
        "lora_parameters": ("better", "what is left out has its default"),
        "lora_parameters.rank": ("same", ""),
        "lora_parameters.scale": ("same", "or `alpha`, not both"),
        "lora_parameters.dropout": ("same", ""),
        "lora_parameters.keys": ("better", "names that match nothing are warned of, or refused"),
        "mask_prompt": ("same", ""),
        "report_to": ("better", "trackio and mlflow too; the verdict is attached"),
        "project_name": ("same", ""),
        "trust_remote_code": ("better", "counts in the file too"),
        "prompt_feature": ("same", ""),
        "completion_feature": ("same", ""),
        "text_feature": ("same", ""),
        "chat_feature": ("same", ""),
        "hf_dataset": ("same", "a mapping, or a list of them"),
        "hf_dataset.path": ("same", ""),
        "hf_dataset.config": ("same", ""),
        "hf_dataset.train_split": ("same", ""),
        "hf_dataset.valid_split": ("same", ""),
        "hf_dataset.test_split": ("same", ""),
        "hf_dataset.prompt_feature": ("same", ""),
        "hf_dataset.completion_feature": ("same", ""),
        "hf_dataset.text_feature": ("same", ""),
        "hf_dataset.chat_feature": ("same", ""),
    }
)
