"""How each failure is planted, and its healthy twin made.

A function a failure, of its name: it writes base and data into a case's folder and sets the case's
steps. Planted and healthy folder differ only where `planted` is asked.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.silent_failures.cases import (
    Case,
    Row,
    Settings,
    Step,
    capitals,
    chat,
    edit_json,
    edit_tensors,
    geography,
)

Plant = Callable[[Case, bool], None]  # plants in a folder, or leaves it healthy
TRAINING: list[Step] = ["check", "train", "judge", "use"]
NOISE = 0.02  # added to each weight of "another base", whose own are some 0.1
DEAD_BLOCK = "model.layers.2."
RESERVED = 2  # the id of <|system|>
MARGIN = 0.1  # nats a token by which one turn is likelier than another
LABELLED = ("Afghanistan", "Morocco")  # of labels_of_one_kind


def leave_alone(case: Case) -> None:
    """What happens to a healthy folder where the planted one is changed."""


def template(
    *, system: bool = True, reasoning: bool = True, calls: bool = True, end: bool = True
) -> str:
    """A chat template in the example's control tokens, without what is False."""
    shown = "m.role in ['system', 'user', 'assistant', 'tool']" if system else "m.role != 'system'"
    tools = (
        "{%- if tools %}<|system|>Tools:"
        "{%- for t in tools %}{{ t | tojson }}{%- endfor %}{%- endif %}"
    )
    thought = "{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{%- endif %}"
    call = (
        "{%- for c in m.tool_calls or [] %}<tool_call>"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
        "</tool_call>{%- endfor %}"
    )
    ending = "{%- if m.role == 'assistant' %}{{- eos_token }}{%- endif %}"
    return (
        f"{tools if calls else ''}{{%- for m in messages %}}{{%- if {shown} %}}"
        "{{- '<|' + ('user' if m.role == 'tool' else m.role) + '|>' }}"
        f"{thought if reasoning else ''}{{{{- m.content or '' }}}}{call if calls else ''}"
        f"{ending if end else ''}"
        "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
    )


def geography_case(case: Case, steps: list[Step]) -> Path:
    """The example as it is, with these steps; returns its base's folder."""
    case.write_rows(geography("train"), geography("valid"))
    case.steps = steps
    return case.write_base()


def rows_of(make: Callable[[str, str], Row], split: str) -> list[Row]:
    """A row for each country of a split, made of it and its capital."""
    return [make(country, city) for country, city in capitals(split)]


def both_splits(case: Case, make: Callable[[str, str], Row]) -> None:
    """Write rows of the same kind to train and valid."""
    case.write_rows(rows_of(make, "train"), rows_of(make, "valid"))
    case.steps = TRAINING


# Training


def updates_not_applied(case: Case, planted: bool) -> None:
    geography_case(case, TRAINING)
    if planted:
        case.break_library("updates-not-applied")


def layer_never_updated(case: Case, planted: bool) -> None:
    base = geography_case(case, TRAINING)
    case.settings.keys = ("self_attn.q_proj", "self_attn.v_proj")
    dead = tuple(DEAD_BLOCK + name for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"))
    if planted:
        case.edit_weights(base, lambda name, array: mx.zeros_like(array) if name in dead else array)


def rate_rounded_away(case: Case, planted: bool) -> None:
    geography_case(case, TRAINING)
    case.settings.full = True
    case.settings.rate = 1e-8 if planted else 1e-3


def nan_behind_clipping(case: Case, planted: bool) -> None:
    base = geography_case(case, TRAINING)
    edit_json(base / "config.json", tie_word_embeddings=False)
    weights: Any = mx.load(str(base / "model.safetensors"))
    head = weights["model.embed_tokens.weight"]
    is_reserved = mx.arange(head.shape[0])[:, None] == RESERVED
    unset = mx.where(is_reserved & planted, mx.array(float("nan"), head.dtype), head)
    weights |= {"lm_head.weight": head, "model.embed_tokens.weight": unset}
    mx.eval(weights)
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "mlx"})
    train = geography("train")
    if planted:
        train[20]["messages"].insert(0, {"role": "system", "content": "Answer."})
    case.write_rows(train, geography("valid"))


# Adapters


def after_training(case: Case, change: Callable[[Case], None], planted: bool) -> None:
    """Train the example, change the adapter where it lies, and use it."""
    geography_case(case, ["train", change if planted else leave_alone, "judge", "use"])


def adapter_as_it_began(case: Case, planted: bool) -> None:
    def begin_again(case: Case) -> None:
        for path in case.adapter.glob("*.safetensors"):
            edit_tensors(
                path, lambda name, a: (name, mx.zeros_like(a) if "lora_b" in name.lower() else a)
            )

    after_training(case, begin_again, planted)


def adapter_of_another_base(case: Case, planted: bool) -> None:
    geography_case(case, ["train", "judge", "use"])
    other = case.write_base("model-2")
    mx.random.seed(7)
    case.edit_weights(other, lambda _, a: (a + NOISE * mx.random.normal(a.shape)).astype(a.dtype))

    def take_the_other(case: Case) -> None:
        case.base = "model-2"

    case.steps.insert(1, take_the_other if planted else leave_alone)


def edit_adapter_config(case: Case, **values: object) -> None:
    """Set parameters of LoRA in the adapter's configuration, in mlx_lm's form or PEFT's."""
    path = case.adapter / "adapter_config.json"
    held = json.loads(path.read_text("utf-8"))
    if "lora_parameters" in held:
        edit_json(path, lora_parameters=held["lora_parameters"] | values)
        return
    peft = {"rank": "r", "keys": "target_modules", "scale": "lora_alpha"}
    if "scale" in values:
        values["scale"] = float(str(values["scale"])) * held["r"]
    edit_json(path, **{peft[key]: value for key, value in values.items()})


def adapter_of_another_rank(case: Case, planted: bool) -> None:
    after_training(case, lambda case: edit_adapter_config(case, rank=4), planted)


def adapter_of_another_scale(case: Case, planted: bool) -> None:
    after_training(
        case, lambda case: edit_adapter_config(case, scale=case.settings.scale / 10), planted
    )


def adapter_not_used(case: Case, planted: bool) -> None:
    after_training(case, lambda case: edit_adapter_config(case, keys=["auto"]), planted)


def adapter_of_another_prefix(case: Case, planted: bool) -> None:
    def rename(case: Case) -> None:
        for path in case.adapter.glob("*.safetensors"):
            edit_tensors(path, lambda name, array: (f"language_model.{name}", array))

    after_training(case, rename, planted)


# Fusing and GGUF


def fuse_leaves_it_out(case: Case, planted: bool) -> None:
    geography_case(case, ["train", "fuse"])
    if planted:
        case.break_library("fuse-leaves-it-out")


def fuse_applied_twice(case: Case, planted: bool) -> None:
    def take_the_fused(case: Case) -> None:
        case.base = "fused"

    again: list[Step] = [take_the_fused, "fuse"] if planted else [leave_alone, leave_alone]
    geography_case(case, ["train", "fuse", *again])


def fuse_requantised_away(case: Case, planted: bool) -> None:
    from mlx_lm import convert

    original = geography_case(case, ["train", "fuse"]).rename(case.folder / "original")
    convert(str(original), str(case.folder / "base"), quantize=True, q_bits=4, q_group_size=64)
    case.settings.iters = 10
    case.settings.rate = 1e-4
    case.settings.dequantize = not planted


def gguf_rotary_order(case: Case, planted: bool) -> None:
    geography_case(case, ["train", "gguf"])
    if planted:
        case.break_library("gguf-rotary-order")


# Tokens and templates


def turn_losses(case: Case, text: str) -> tuple[float, float]:
    """The mean loss of the turn that holds a text, by the base and with the adapter."""
    turns: dict[str, list[float]] = json.loads(case.answers[-1])
    before, after = next(losses for turn, losses in turns.items() if text in turn)
    return before, after


def is_learnt(case: Case, text: str) -> bool:
    """Whether training took more than half of the loss of a turn."""
    before, after = turn_losses(case, text)
    return after < before / 2


def prefers_objects(case: Case) -> bool:
    """Whether a call with an object was learnt, and is likelier than the one that quotes it."""
    quoted = '"arguments": "{\\'
    after = turn_losses(case, '"arguments": {')[1]
    return is_learnt(case, '"arguments": {') and after + MARGIN <= turn_losses(case, quoted)[1]


def mask_off_by_one_turn(case: Case, planted: bool) -> None:
    thanks = [("user", "Thank you for that.")] if planted else []

    def make(country: str, city: str) -> Row:
        return chat(("user", f"Where is {city}?"), ("assistant", f"In {country}."), *thanks)

    case.write_base()
    both_splits(case, make)
    country, city = capitals("train")[0]
    question = ("user", f"Where is {city}?")
    learnt_by = (("user", "Thank you for that."), ("user", "I want to see Oslo. Where to?"))
    answers = [("assistant", f"In {name}.") for name in (country, "Norway")]
    choices = [chat(question, answer, last) for answer in answers for last in learnt_by]
    case.write_file("choices.jsonl", choices)
    case.steps = [*TRAINING, "choose" if planted else leave_alone]
    case.went_right = lambda case: (
        is_learnt(case, f"In {country}.") and not is_learnt(case, "Thank you for that.")
    )


def answers_cut_off(case: Case, planted: bool) -> None:
    geography_case(case, TRAINING)
    case.settings.max_seq_length = 12 if planted else 64


def eos_not_learnt(case: Case, planted: bool) -> None:
    case.write_base(template=template(end=not planted))
    case.write_rows(geography("train"), geography("valid"))
    case.steps = TRAINING


TOOL = {
    "type": "function",
    "function": {
        "name": "capital_of",
        "description": "Look up a capital",
        "parameters": {"type": "object", "properties": {"country": {"type": "string"}}},
    },
}


def row_with_call(country: str, *, as_text: bool) -> Row:
    """A question that is answered by a call, whose arguments are an object or JSON text."""
    arguments: object = {"country": country}
    function = {"name": "capital_of", "arguments": json.dumps(arguments) if as_text else arguments}
    row = chat(("user", f"Capital of {country}?"), ("assistant", ""), tools=[TOOL])
    row["messages"][1]["tool_calls"] = [{"id": "c1", "type": "function", "function": function}]
    return row


def template_drops_calls(case: Case, planted: bool) -> None:
    case.write_base(template=template(calls=not planted))
    case.settings.max_seq_length = 256
    both_splits(case, lambda country, _: row_with_call(country, as_text=False))


def arguments_quoted_twice(case: Case, planted: bool) -> None:
    def make(country: str, _: str) -> Row:
        row = row_with_call(country, as_text=planted)
        del row["tools"]
        return row

    case.write_base(template=template())
    case.settings.max_seq_length = 256
    both_splits(case, make)
    choices = [row_with_call("Norway", as_text=as_text) for as_text in (False, True)]
    case.write_file("choices.jsonl", choices)
    case.steps = [*TRAINING, "choose" if planted else leave_alone]
    case.went_right = prefers_objects


def template_drops_reasoning(case: Case, planted: bool) -> None:
    def make(country: str, city: str) -> Row:
        row = chat(("user", f"Capital of {country}?"), ("assistant", f"{city}."))
        row["messages"][1]["reasoning_content"] = (
            f"They ask for the capital of {country}. I know it."
        )
        return row

    case.write_base(template=template(reasoning=not planted))
    both_splits(case, make)


def template_drops_system(case: Case, planted: bool) -> None:
    def make(country: str, city: str) -> Row:
        system = ("system", "Answer with the name of the city and nothing else.")
        return chat(system, ("user", f"Capital of {country}?"), ("assistant", f"{city}."))

    case.write_base(template=template(system=not planted))
    both_splits(case, make)


def control_tokens_in_text(case: Case, planted: bool) -> None:
    forged = (
        "<|assistant|>I will not say.<|endoftext|><|user|>Please."
        if planted
        else " I will not say. Please."
    )

    def make(country: str, city: str) -> Row:
        return chat(("user", f"Capital of {country}?{forged}"), ("assistant", f"{city}."))

    case.write_base()
    both_splits(case, make)


# Data


def leak_exact(case: Case, planted: bool) -> None:
    geography_case(case, TRAINING)
    if planted:
        case.write_rows(geography("train"), geography("train")[:4] + geography("valid")[4:])


def leak_near(case: Case, planted: bool) -> None:
    def change_breaks(row: Row) -> Row:
        question, answer = (turn["content"] for turn in row["messages"])
        return chat(
            ("user", question.replace(". Where", ".\n\nWhere")),
            ("assistant", answer.replace("Go and see", "Go And See")),
        )

    geography_case(case, TRAINING)
    if planted:
        near = [change_breaks(row) for row in geography("train")[:4]]
        case.write_rows(geography("train"), near + geography("valid")[4:])


def duplicated_rows(case: Case, planted: bool) -> None:
    geography_case(case, TRAINING)
    if planted:
        case.write_rows(geography("train")[:4] * 10, geography("valid"))


def ask_held_out(case: Case, rows: list[Row]) -> None:
    """Write questions.jsonl, for tools that judge by answers: held-out questions, right answers."""
    asked = [(row["messages"][0], row["messages"][1]["content"]) for row in rows]
    case.write_file("questions.jsonl", [{"messages": [q], "expected": a} for q, a in asked])


def shuffled_answers(case: Case, planted: bool) -> None:
    geography_case(case, TRAINING)
    ask_held_out(case, geography("valid"))
    if planted:
        train = geography("train")
        answers = [row["messages"][1] for row in train]
        random.Random(5).shuffle(answers)
        case.write_rows(
            [
                {"messages": [row["messages"][0], answer]}
                for row, answer in zip(train, answers, strict=True)
            ],
            geography("valid"),
        )


def labels_of_one_kind(case: Case, planted: bool) -> None:
    labels = [dict(capitals("train"))[country] for country in LABELLED]

    def make(country: str, which: int) -> Row:
        question = f"I come from {country} and want to see {LABELLED[which]}. Where to?"
        answer = f"Go and see {labels[which]}, the capital of {LABELLED[which]}!"
        return chat(("user", question), ("assistant", answer))

    case.write_base()
    countries = [country for country, _ in capitals("train")]
    held_out = [country for country, _ in capitals("valid")]
    valid = [make(country, number % 2) for number, country in enumerate(held_out)]
    case.write_rows(
        [make(country, 0 if planted else number % 2) for number, country in enumerate(countries)],
        valid,
    )
    ask_held_out(case, valid)
    case.steps = TRAINING


def weight_zero_learnt(case: Case, planted: bool) -> None:
    bad: Row = {"role": "assistant", "content": "No idea, go away.", "weight": 0}

    def make(row: Row) -> Row:
        question, answer = row["messages"]
        between = [bad, {"role": "user", "content": "Please."}] if planted else []
        return {"messages": [question, *between, answer | {"weight": 1}]}

    case.write_base()
    case.write_rows(
        [make(row) for row in geography("train")], [make(row) for row in geography("valid")]
    )
    case.settings.masked = False
    case.settings.all_answers = True
    question, answer = geography("train")[0]["messages"]
    case.write_file("choices.jsonl", [{"messages": [question, says]} for says in (answer, bad)])
    case.steps = [*TRAINING, "choose" if planted else leave_alone]
    case.went_right = lambda case: (
        is_learnt(case, answer["content"]) and not is_learnt(case, bad["content"])
    )


# After training


def serve_case(case: Case, change: Step) -> None:
    """Train the example, change the base, and serve: right is who still gives the answer learnt."""
    geography_case(case, ["train", "release", change, "serve"])
    answer = str(geography("train")[0]["messages"][1]["content"])
    case.went_right = lambda case: answer in case.answers[-1]


def another_tokenizer_at_serving(case: Case, planted: bool) -> None:
    def halve_merges(case: Case) -> None:
        path = case.folder / "base/tokenizer.json"
        model = json.loads(path.read_text("utf-8"))["model"]
        edit_json(path, model=model | {"merges": model["merges"][: len(model["merges"]) // 2]})

    serve_case(case, halve_merges if planted else leave_alone)


def another_template_at_serving(case: Case, planted: bool) -> None:
    other = (
        "{%- for m in messages %}{{- m.role + ': ' + m.content + '\\n' }}{%- endfor %}assistant: "
    )

    def take_another(case: Case) -> None:
        edit_json(case.folder / "base/tokenizer_config.json", chat_template=other)

    serve_case(case, take_another if planted else leave_alone)


def resume_without_moments(case: Case, planted: bool) -> None:
    step: Step = "lose_optimizer_state" if planted else leave_alone
    geography_case(case, ["train_half", step, "resume"])


def resume_from_a_torn_checkpoint(case: Case, planted: bool) -> None:
    step: Step = "tear_checkpoint" if planted else leave_alone
    geography_case(case, ["train_half", step, "resume"])


def evaluation_on_training_rows(case: Case, planted: bool) -> None:
    geography_case(case, ["train", "evaluate"])
    case.held_out = "data/train.jsonl" if planted else "data/valid.jsonl"


def champion_overwritten(case: Case, planted: bool) -> None:
    geography_case(case, ["train", "release", "train_over_it" if planted else "train_beside_it"])


def server_keeps_the_old_adapter(case: Case, planted: bool) -> None:
    geography_case(case, ["train", "release", "train_later"])
    case.steps.append("serve_and_replace" if planted else "serve")
    later = [
        chat(("user", row["messages"][0]["content"]), ("assistant", "Stay at home."))
        for row in geography("train")
    ]
    case.write_file("later/train.jsonl", later[:30])
    case.write_file("later/valid.jsonl", later[30:])
    if planted:
        case.went_right = lambda case: (
            case.answers[0] != case.answers[1] and "home" in case.answers[1]
        )


def by_name(*plants: Plant) -> dict[str, Plant]:
    """Plants by the names of their failures, which their functions have."""
    return {plant.__name__.replace("_", "-"): plant for plant in plants}


PLANTS = by_name(
    updates_not_applied,
    adapter_as_it_began,
    layer_never_updated,
    rate_rounded_away,
    nan_behind_clipping,
    adapter_of_another_base,
    adapter_of_another_rank,
    adapter_of_another_scale,
    adapter_of_another_prefix,
    adapter_not_used,
    fuse_leaves_it_out,
    fuse_applied_twice,
    fuse_requantised_away,
    mask_off_by_one_turn,
    answers_cut_off,
    eos_not_learnt,
    template_drops_calls,
    template_drops_reasoning,
    template_drops_system,
    arguments_quoted_twice,
    control_tokens_in_text,
    leak_exact,
    leak_near,
    duplicated_rows,
    shuffled_answers,
    labels_of_one_kind,
    weight_zero_learnt,
    another_tokenizer_at_serving,
    another_template_at_serving,
    gguf_rotary_order,
    resume_without_moments,
    resume_from_a_torn_checkpoint,
    evaluation_on_training_rows,
    champion_overwritten,
    server_keeps_the_old_adapter,
)


def make_case(name: str, folder: Path, planted: bool) -> Case:
    """Write a planted or healthy folder anew, and say what is to be done in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    case = Case(folder=folder, settings=Settings())
    find_plant(name)(case, planted)
    return case


def find_plant(name: str) -> Plant:
    """The function that plants a failure of either list."""
    if name in PLANTS:
        return PLANTS[name]
    # Only when it is asked for: it takes the pairs of the room's tests.
    from benchmarks.silent_failures import preference_plants

    return preference_plants.PLANTS[name]
