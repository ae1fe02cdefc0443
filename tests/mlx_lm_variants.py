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


@dataclass(frozen=True, kw_only=True)
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
        name="lora_config.yaml",
        yaml=EXAMPLE,
        flags=EXAMPLE_FLAGS,
        whole=True,
        shows="mlx-lm's example file; flags win over it",
    ),
    Variant(
        name="lora_config.yaml, schedule",
        yaml=EXAMPLE + COMMENTED_OUT,
        flags=EXAMPLE_FLAGS,
        whole=True,
        shows="the same with its commented-out optimizer_config and lr_schedule",
    ),
    Variant(
        name="lora_config.yaml, wandb",
        yaml=EXAMPLE + "report_to: wandb\nproject_name: capitals\n",
        flags=EXAMPLE_FLAGS,
        whole=True,
        shows="the same with its commented-out report_to and project_name",
    ),
    Variant(
        name="lora_config.yaml, hub",
        yaml=EXAMPLE
        + "hf_dataset:\n  path: $questions\n  train_split: 'train[:8]'\n"
        + "  valid_split: 'train[-4:]'\n  prompt_feature: text\n  completion_feature: summary\n"
        + "  config: {cache_dir: $cache}\n",
        flags=(*EXAMPLE_FLAGS[:2], *EXAMPLE_FLAGS[4:]),
        whole=True,
        shows="the same with its commented-out hf_dataset",
        needs="datasets",
    ),
    Variant(
        name="LORA.md, features",
        yaml="data: $renamed\nprompt_feature: input\ncompletion_feature: output\n",
        shows="the documented keys for prompts and completions of another name",
    ),
    Variant(
        name="LORA.md, two data sets",
        yaml="hf_dataset:\n"
        "- {path: $questions, train_split: 'train[:90%]', valid_split: 'train[-10%:]',\n"
        "   prompt_feature: text, completion_feature: summary, config: {cache_dir: $cache}}\n"
        "- {path: $conversations, train_split: 'train[:90%]', valid_split: 'train[-10%:]',\n"
        "   chat_feature: chosen, config: {cache_dir: $cache}}\n",
        shows="the documented list of data sets",
        needs="datasets",
    ),
    Variant(
        name="LORA.md, text of the hub",
        yaml="test: true\nhf_dataset: {path: $bodies, train_split: train, test_split: test,\n"
        "  valid_split: validation, text_feature: body, config: {cache_dir: $cache}}\n",
        shows="a data set of texts, with its split for testing",
        needs="datasets",
    ),
    Variant(
        name="LORA.md, little memory",
        yaml="model: $base\n",
        flags=(
            *("--train", "--batch-size", "1", "--num-layers", "2", "--data", "$chats"),
            *("--iters", "2", "--adapter-path", "adapters"),
        ),
        whole=True,
        shows="the documented command for little memory; all else as by default",
    ),
)

TRAINED = (
    Variant(name="plain", shows="the smallest file: model, data, length and snapshots"),
    Variant(
        name="dora",
        yaml="fine_tune_type: dora\nlora_parameters: {rank: 4, scale: 2.0, dropout: 0.0}\n",
        shows="DoRA, with its magnitudes",
    ),
    Variant(
        name="full", yaml="fine_tune_type: full\nnum_layers: 1\n", shows="weights of one layer"
    ),
    Variant(name="quantised", yaml="model: $quantised\n", shows="QLoRA: a base of 4 bits"),
    Variant(
        name="adamw",
        yaml="optimizer: adamw\n"
        "optimizer_config: {adamw: {weight_decay: 0.1, betas: [0.9, 0.95]}}\n",
        shows="an optimizer with arguments",
    ),
    Variant(
        name="sgd",
        yaml="optimizer: sgd\noptimizer_config: {sgd: {momentum: 0.9}}\n",
        shows="sgd with momentum",
    ),
    Variant(name="muon", yaml="optimizer: muon\n", shows="muon"),
    Variant(name="adafactor", yaml="optimizer: adafactor\n", shows="adafactor"),
    Variant(
        name="optimizer in capitals",
        yaml="optimizer: AdamW\noptimizer_config: {adamw: {weight_decay: 0.1}}\n",
        shows="a name in capitals, which mlx_lm.lora takes in a file",
    ),
    Variant(
        name="cosine",
        yaml="lr_schedule:\n  name: cosine_decay\n  warmup: 2\n  warmup_init: 1e-7\n"
        "  arguments: [1e-3, 4, 1e-5]\n",
        shows="a schedule with its warm-up",
    ),
    Variant(
        name="linear",
        yaml=SCHEDULE.format("linear_schedule", "[1e-3, 1e-4, 4]"),
        shows="linear_schedule",
    ),
    Variant(
        name="exponential",
        yaml=SCHEDULE.format("exponential_decay", "[1e-3, 0.9]"),
        shows="exponential_decay",
    ),
    Variant(name="steps", yaml=SCHEDULE.format("step_decay", "[1e-3, 0.5, 2]"), shows="step_decay"),
    Variant(
        name="accumulation",
        yaml="iters: 8\ngrad_accumulation_steps: 2\nsave_every: 3\n",
        shows="snapshots 3 and 6: the first is within an update, and has the weights before it",
    ),
    Variant(
        name="accumulation, every iteration",
        yaml="iters: 4\ngrad_accumulation_steps: 4\nsave_every: 1\n",
        shows="four snapshots of a single update",
    ),
    Variant(
        name="accumulation, remainder",
        yaml="iters: 5\ngrad_accumulation_steps: 2\nsave_every: 5\n",
        shows="a last update of one micro-batch, which mlx_lm.lora leaves out",
        relation="better",
    ),
    Variant(name="every iteration", yaml="save_every: 1\n", shows="a snapshot each iteration"),
    Variant(name="no snapshot", yaml="save_every: 9\n", shows="save_every above iters"),
    Variant(
        name="last one is no snapshot",
        yaml="iters: 5\nsave_every: 3\n",
        shows="iters that are no multiple of save_every: snapshot 3 alone",
    ),
    Variant(name="mask_prompt", yaml="mask_prompt: true\n", shows="answers alone are trained on"),
    Variant(
        name="completions",
        yaml="data: $completions\nmask_prompt: true\n",
        shows="prompts and completions",
    ),
    Variant(name="texts", yaml="data: $texts\n", shows="plain text"),
    Variant(
        name="text_feature",
        yaml="data: $bodies\ntext_feature: body\n",
        shows="plain text under another key",
    ),
    Variant(
        name="chat_feature",
        yaml="data: $dialogues\nchat_feature: dialogue\n",
        shows="chats under another key",
    ),
    Variant(name="tools", yaml="data: $tools\n", shows="chats that call tools"),
    Variant(
        name="grad_checkpoint",
        yaml="grad_checkpoint: true\n",
        shows="recomputed layers, same loss; with dropout mlx_lm.lora takes the gradient under "
        "other masks than the loss",
    ),
    Variant(name="all layers", yaml="num_layers: -1\n", shows="-1 is every layer"),
    Variant(name="0 layers", yaml="num_layers: 0\n", shows="0 is every layer too"),
    Variant(
        name="keys",
        yaml="lora_parameters:\n  keys: [self_attn.q_proj, mlp.down_proj]\n"
        "  rank: 2\n  scale: 4\n  dropout: 0.1\n",
        shows="chosen modules; a whole number as scale; dropout",
    ),
    Variant(
        name="embeddings",
        yaml="lora_parameters: {rank: 2, scale: 2.0, dropout: 0.0, keys: [model.embed_tokens]}\n",
        shows="a module outside of the layers",
    ),
    Variant(
        name="from an adapter",
        yaml="resume_adapter_file: $adapter\n",
        shows="training goes on from an adapters.safetensors",
    ),
    Variant(name="seed", yaml="seed: 7\n", shows="another seed"),
    Variant(
        name="whole evaluations",
        yaml="val_batches: -1\ntest: true\ntest_batches: -1\n",
        shows="-1 is the whole validation and test set",
    ),
    Variant(
        name="test", yaml="test: true\ntest_batches: 1\n", shows="the loss on test.jsonl at the end"
    ),
    Variant(
        name="truncated", yaml="max_seq_length: 12\n", shows="examples longer than max_seq_length"
    ),
    Variant(name="no valid.jsonl", yaml="data: $only_train\n", shows="training without validation"),
    Variant(
        name="words of YAML",
        yaml="train: yes\nmask_prompt: on\ngrad_checkpoint: no\nlearning_rate: 1.0E-3\n"
        "resume_adapter_file: ~\nlr_schedule: null\n",
        shows="yes, on and no; an exponent; null is the default",
    ),
    Variant(
        name="mlx_lm's own adapter_config.json",
        yaml='{"adapter_path": "adapters", "batch_size": 2, "data": "$chats", "fine_tune_type": '
        '"lora", "iters": 4, "learning_rate": 1e-03, "lora_parameters": {"dropout": 0.0, "rank": '
        '8, "scale": 20.0}, "lr_schedule": null, "model": "$base", "num_layers": 2, "optimizer": '
        '"adam", "optimizer_config": {"adafactor": {}, "adam": {}, "adamw": {}, "muon": {}, "sgd": '
        '{}}, "report_to": null, "save_every": 2, "train": true, "val_batches": 1}\n',
        whole=True,
        shows="the adapter_config.json that it wrote, without the key config",
    ),
    Variant(name="underscore", yaml="iters: 1_0\n", shows="a number of YAML 1.1, which is 10"),
    Variant(
        name="clear_cache_threshold",
        yaml="clear_cache_threshold: 1000000\n",
        shows="mlx_lm.lora takes it from the flag alone",
        relation="better",
    ),
    Variant(
        name="trust_remote_code",
        yaml="model: $own_code\ntrust_remote_code: true\n",
        shows="mlx_lm.lora takes it from the flag alone, and refuses the model",
        relation="better",
        there="trust_remote_code",
    ),
    Variant(
        name="rank alone",
        yaml="lora_parameters: {rank: 4}\n",
        shows="what is left out of lora_parameters has its default",
        relation="better",
        there="missing required key 'scale'",
    ),
    Variant(
        name="alpha",
        yaml="lora_parameters: {rank: 4, alpha: 8, dropout: 0.0}\n",
        shows="PEFT's alpha in place of scale",
        relation="better",
        there="missing required key 'scale'",
    ),
    Variant(
        name="val_batches 0",
        yaml="val_batches: 0\n",
        shows="no validation, where mlx_lm.lora divides by zero tokens",
        relation="better",
    ),
    Variant(
        name="train left out",
        without="train",
        shows="the command trains without being told",
        relation="better",
        there="at least one of --train or --test",
    ),
)


def _refused(*, code: int = 2, **fields: Any) -> Variant:
    """A variant that ends in an error here."""
    return Variant(relation="refused", code=code, **fields)


REFUSED = (
    _refused(
        name="typo",
        yaml="learning-rate: 1e-3\n",
        shows="a key that mlx_lm.lora passes over",
        here="learning-rate: unknown key; did you mean learning_rate? (line 13)",
    ),
    _refused(
        name="lora_layers",
        yaml="lora_layers: 2\n",
        shows="a key of earlier mlx-lm, which it passes over now",
        here="lora_layers: unknown key; did you mean num_layers?",
    ),
    _refused(
        name="alpha and scale",
        yaml="lora_parameters: {rank: 8, alpha: 16, scale: 10.0, dropout: 0.0}\n",
        shows="two values for one number, of which mlx_lm.lora takes scale",
        here="alpha and scale say the same thing",
    ),
    _refused(
        name="config in the file",
        yaml="config: other.yaml\n",
        shows="a file within a file, which mlx_lm.lora passes over",
        here="config: unknown key; config is the flag -c",
    ),
    _refused(
        name="anchor",
        yaml="data: &data $chats\n",
        shows="YAML by reference",
        here="an anchor or alias (& or *) is not allowed here",
    ),
    _refused(
        name="key twice",
        yaml="seed: 1\nseed: 2\n",
        shows="a key given twice, of which mlx_lm.lora takes the last",
        here="the key 'seed', which stands in line 13 too, is not allowed here",
    ),
    _refused(
        name="octal",
        yaml="seed: 010\n",
        shows="8 to some readers and 10 to others",
        here="is octal to some readers",
    ),
    _refused(
        name="rate 0",
        yaml="learning_rate: 0\n",
        shows="a training that changes nothing",
        here="learning_rate: Input should be greater than 0",
    ),
    _refused(
        name="save_every 0",
        yaml="save_every: 0\n",
        shows="a division by zero there",
        here="save_every: Input should be greater than 0",
        there="ZeroDivisionError",
    ),
    _refused(
        name="too many layers",
        yaml="num_layers: 3\n",
        shows="more layers than the model has",
        here="num_layers: 3 layers",
        there="Requested to train 3 layers",
    ),
    _refused(
        name="arguments",
        yaml="optimizer_config: {adam: {weight_decay: 0.1}}\n",
        shows="an argument that the optimizer does not take",
        here="optimizer_config.adam does not take ['weight_decay']",
        there="unexpected keyword argument 'weight_decay'",
    ),
    _refused(
        name="masked text",
        yaml="data: $texts\nmask_prompt: true\n",
        shows="plain text has no prompt to mask",
        code=3,
        here="mask_prompt needs prompts; plain text has none",
        there="Prompt masking not supported for text dataset",
    ),
    _refused(
        name="few examples",
        yaml="batch_size: 16\nval_batches: -1\n",
        shows="a batch larger than the data set",
        code=3,
        here="it holds 12 of the 16 rows that fill one batch; lower batch_size",
        there="must have at least batch_size=16",
    ),
    _refused(
        name="keys of nothing",
        yaml="lora_parameters: {rank: 2, scale: 2.0, dropout: 0.0, keys: [q_proj]}\n",
        shows="names that no module has",
        here="nothing would be trained. No module is named q_proj",
        there="Must specify at least one argument",
    ),
    _refused(
        name="no model",
        yaml="model: null\n",
        shows="mlx_lm.lora's default model would be fetched from the hub",
        here="No model given",
        there="Cannot find an appropriate cached snapshot",
    ),
    _refused(
        name="no data",
        yaml="data: null\n",
        shows="its default data set, too",
        here="No data given",
        there="mlx-community/WikiSQL",
    ),
    _refused(
        name="service not installed",
        yaml="report_to: swanlab\n",
        shows="a service whose client is not there",
        here="report_to: swanlab is not installed",
        there="swanlab is not installed",
    ),
)

# Each flag of mlx_lm.lora's parser by itself, beside a file that has the other keys.
FLAGS = MappingProxyType(
    {
        "--model": ("--model", "$base"),
        "--train": ("--train",),
        "--data": ("--data", "$completions"),
        "--fine-tune-type": ("--fine-tune-type", "dora"),
        "--optimizer": ("--optimizer", "adamw"),
        "--mask-prompt": ("--mask-prompt",),
        "--num-layers": ("--num-layers", "1"),
        "--batch-size": ("--batch-size", "3"),
        "--iters": ("--iters", "2"),
        "--val-batches": ("--val-batches", "2"),
        "--learning-rate": ("--learning-rate", "1e-4"),
        "--steps-per-report": ("--steps-per-report", "1"),
        "--steps-per-eval": ("--steps-per-eval", "3"),
        "--grad-accumulation-steps": ("--grad-accumulation-steps", "2"),
        "--resume-adapter-file": ("--resume-adapter-file", "$adapter"),
        "--adapter-path": ("--adapter-path", "elsewhere"),
        "--save-every": ("--save-every", "3"),
        "--test": ("--test",),
        "--test-batches": ("--test-batches", "1"),
        "--max-seq-length": ("--max-seq-length", "16"),
        "-c": ("-c", "$other"),
        "--config": ("--config", "$other"),
        "--grad-checkpoint": ("--grad-checkpoint",),
        "--clear-cache-threshold": ("--clear-cache-threshold", "1MB"),
        "--report-to": ("--report-to", "wandb"),
        "--project-name": ("--project-name", "capitals"),
        "--seed": ("--seed", "5"),
        "--trust-remote-code": ("--trust-remote-code",),
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
