"""What models answer and predict, side by side, without training: `nested-tune evaluate`.

The answers, the losses and what they show are computed by the gate's own functions, so that an
adapter has the figures here that its verdict has.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nested_core import seams
from nested_core.config.loading import parse_config, parse_tasks
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import TaskSection
from nested_core.errors import ConfigError
from nested_core.gate.checks.tasks import AskedModel, ask_model, score_answers
from nested_core.gate.evidence.champion_adapter import shape_like_adapter
from nested_core.gate.tensors.base_compatibility import base_reasons, fingerprint_reasons
from nested_core.measure.answers.answer_bounds import ScoreChange
from nested_core.measure.answers.suite_answers import EncodedSuite, encode_suites, read_suites
from nested_core.measure.losses.held_out_loss import (
    HeldOutExamples,
    LoadedBase,
    read_held_out_examples,
)
from nested_core.measure.losses.loss_figures import summarise_losses
from nested_core.models.base_model import find_model_folder
from nested_core.pipeline.named_models import (
    ModelFormat,
    NamedModel,
    find_model,
    read_training_config,
)
from nested_core.records.answers import AnswerRecord
from nested_core.records.comparison_family import (
    NOT_TESTED,
    Chance,
    chance_of_mean,
    find_beyond_chance,
)
from nested_core.records.loss_conclusion import Conclusion
from nested_core.records.losses import Vector
from nested_core.records.verdict import ComparedLoss, Validation
from nested_core.rooms.evaluate.page import (
    MAX_MODELS,
    AnsweredQuestion,
    EvaluatedModel,
    Evaluation,
    SuiteScore,
)
from nested_core.text.groups import grouped
from nested_core.text.stages import stages

BASE = "base"
COUNTS_PROMPTS = (
    "prompts, where rows have them, count in the losses too (mask_prompt: false): no run says how "
    "its rows were read; -c CONFIG says it"
)


def evaluate(
    models: Sequence[str | Path],
    *,
    suites: Sequence[str | Path | Mapping[str, Any] | TaskSection] = (),
    data: str | Path | None = None,
    against: str | Path | None = None,
    config: FineTuneConfig | None = None,
    registry: Path | None = None,
    base_model: str | None = None,
    program: str | None = None,
) -> Evaluation:
    """Ask models questions and measure their held-out losses; return both, and compare them.

    Args:
        models: bases, adapters of mlx_lm or PEFT, runs, NAME, NAME@VERSION or REGISTRY/NAME, and
            exported folders or GGUFs.
        suites: files, or entries of `gate.tasks`; by default those of `config`, and none if only
            `data` is given. A file is scored as `config` does it, or else by `contains`.
        data: a JSON Lines file; the losses on it are compared example by example.
        against: the model that the others are compared with; by default the first one's base, or
            itself where that is not known.
        config: how data is read and batched. By default that of the first run among the models.
        registry: where a NAME is looked for; `registry` by default.
        base_model: the base of an adapter that names none, or another place of it.
        program: "llama.cpp" asks GGUFs there, and not in MLX.

    Raises ConfigError for an unknown name or an adapter that does not fit its base, DatasetError
    for bad questions or examples, DamagedError for damaged files.
    """
    if len(models) >= MAX_MODELS:
        raise ConfigError(f"evaluate: at most {MAX_MODELS - 1} models at once.")
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nested-tune-")))
        sources = [
            _find_in_program(str(given), program, base_model)
            or find_model(str(given), registry, base_model, temporary / str(number))
            for number, given in enumerate([*([against] if against else []), *models])
        ]
        _require_asked(program, [model for model, _ in sources], data)
        named = [model for model, _ in sources]
        names = [model.name for model in named]
        base = None if against else _base_of(named[0], base_model, names)
        if base is not None:
            named.insert(0, base)
        added = named[0] if against or base else None
        names = [model.name for model in named]
        if len(set(names)) < len(names):
            raise ConfigError(f"evaluate: a model is named twice: {', '.join(names)}.")
        asks_configured = config is not None or data is None
        if config is None:
            adapters = ((model.adapter.path, run) for model, run in sources if model.adapter)
            trained = (read_training_config(folder, run) for folder, run in adapters)
            config = next(filter(None, trained), None)
        notes = (COUNTS_PROMPTS,) if config is None and data is not None else ()
        if config is None:
            config = parse_config({"model": named[0].model, "num_layers": -1}, source="the model")
        configured = config.gate.tasks
        tasks = parse_tasks(suites, configured) or (configured if asks_configured else ())
        gate = config.gate.model_copy(update={"tasks": tasks})
        if data is not None:
            gate = gate.model_copy(update={"held_out": str(data)})
        if not gate.tasks and data is None:
            raise ConfigError("evaluate: nothing to ask: give an eval set, examples or both.")
        config = config.model_copy(update={"gate": gate})
        asked = _Evaluating(config, named, added, None if data is None else str(data))
        return replace(asked.run(), notes=notes)


def _find_in_program(
    given: str, program: str | None, base_model: str | None
) -> tuple[NamedModel, None] | None:
    """Return a model that a program answers for; None for one that is asked in mlx_lm."""
    if program is None:
        return None
    found = seams.load_only(ModelFormat, f"--in {program}").find_in_program(given, base_model)
    return None if found is None else (found, None)


def _require_asked(
    program: str | None, models: Sequence[NamedModel], data: str | Path | None
) -> None:
    """Raise ConfigError for a program that has nothing to answer, or is to measure losses."""
    if program is not None and not any(model.answer for model in models):
        raise ConfigError(f"evaluate: --in {program} is for GGUFs, and none is given.")
    if program is not None and data is not None:
        raise ConfigError(
            f"evaluate: {program} answers questions; losses are measured in MLX. Give --data "
            f"without --in."
        )


def _base_of(
    model: NamedModel, base_model: str | None, names: Collection[str]
) -> NamedModel | None:
    """Return the base of a model, for an exported model the one that it was made of.

    None for a base itself, and for an exported model without its record, unless `base_model` is
    given.

    It is named "base", or, if that is one of `names`, "base" with its path. Raises ConfigError if
    the base of an exported model has changed.
    """
    name = f"{BASE} {base_model or model.model}" if BASE in names else BASE
    if model.adapter is not None:
        return NamedModel(name, model.model, None, model.trust_remote_code)
    if model.made_of is None:
        return None if base_model is None else NamedModel(name, base_model)
    base = base_model or model.made_of.base
    recorded = {"base_fingerprint": model.made_of.fingerprint}
    if reasons := fingerprint_reasons(recorded, find_model_folder(base)):
        raise ConfigError(
            f"{model.name}: {reasons[0].message}. Give the place of its base by --model, or "
            f"--against another model."
        )
    return NamedModel(name, base)


class _Evaluating:
    """The models of one evaluation, each loaded into a base that others of its form share.

    added: the first model where it is there only to be compared with, which no bound is for.
    """

    def __init__(
        self,
        config: FineTuneConfig,
        models: Sequence[NamedModel],
        added: NamedModel | None,
        data: str | None,
    ) -> None:
        self._config = config
        self._models = models
        self._added = added
        self._data = data
        self._records: dict[str, dict[str, list[AnswerRecord]]] = {}  # by model, then by suite
        self._losses: dict[str, tuple[HeldOutExamples, Vector, Vector]] = {}
        self._suites = read_suites(config.gate)
        asked = [(suite, [one.line for one in suite.questions]) for suite in self._suites]
        best = [suite.find_best_constant(lines) for suite, lines in asked]
        self._constants = [one and one[1] for one in best]

    def run(self) -> Evaluation:
        """Evaluate all models and return the result; each base is loaded once for its models."""
        for models in grouped((_form(one, self._models), one) for one in self._models).values():
            self._measure(models)
        measured = () if self._data is None else self._models
        return Evaluation(
            against=self._models[0].name,
            models=tuple(self._compare_models()),
            answers=tuple(self._answered_questions()),
            data=self._data,
            unknown=tuple(model.name for model in measured if model.seen.unknown is not None),
        )

    def _measure(self, models: Sequence[NamedModel]) -> None:
        """Ask and measure models of one base; keep their answers and losses in this object."""
        first = models[0]
        stages.info("evaluate: loading %s", first.model)
        config = self._config.model_copy(
            update={"model": first.model, "trust_remote_code": first.trust_remote_code}
        )
        adapter = next((model.adapter for model in models if model.adapter is not None), None)
        base = LoadedBase.load(config if adapter is None else shape_like_adapter(adapter, config))
        for model in models:
            _require_fit(model, base)
        formats = [other.prompt_format for other in self._models if other.prompt_format]
        for model in models:
            # A model without a prompt format, such as the base, is asked in that of the first other
            rows = model.prompt_format or next(iter(formats), None)
            encoded = encode_suites(self._suites, base.tokenizer, base.folder, rows)
            answers = None if model.answer is None else model.answer(base.tokenizer, encoded)
            self._records[model.name] = {
                suite.suite.name: _ask(model, base, suite)
                if answers is None
                else score_answers(suite, "candidate", answers[suite.suite.name], 0.0)
                for suite in encoded
            }
        if self._data is None:
            return
        stages.info("evaluate: losses of %d models on %s", len(models), self._data)
        held_out = read_held_out_examples(config, {})
        if held_out is None:
            raise ConfigError(f"evaluate: {self._data} names no file of examples.")
        adapters = (model.adapter for model in models)
        tensors = [base.parameters if one is None else one.to_mlx() for one in adapters]
        predictions = base.compare_predictions(tensors, held_out.split)
        for model, losses in zip(models, predictions.losses, strict=True):
            self._losses[model.name] = (held_out, losses, predictions.tokens)

    def _compare_models(self) -> Iterator[EvaluatedModel]:
        """Yield each model's figures, the reference's first; others with their comparison to it."""
        stages.info("evaluate: comparing the models")
        reference, *others = self._models
        changes = [self._compare_answers(model, reference) for model in others]
        losses = [self._compare_losses(model, reference) for model in self._models]
        yield EvaluatedModel(reference.name, tuple(self._score_suites(reference)), losses[0])
        words = conclude_models(changes, losses[1:], self._config.gate.noise)
        compared = zip(others, changes, losses[1:], words, strict=True)
        for model, own_changes, loss, (suite_words, loss_word) in compared:
            scores = tuple(
                replace(
                    score, difference=gain.difference.mean, interval=gain.interval, conclusion=word
                )
                for score, gain, word in zip(
                    self._score_suites(model), own_changes, suite_words, strict=True
                )
            )
            loss = None if loss is None else replace(loss, conclusion=loss_word)
            yield EvaluatedModel(model.name, scores, loss)

    def _score_suites(self, model: NamedModel) -> list[SuiteScore]:
        """Return a model's mean score in each suite."""
        answers = self._records[model.name]
        return [
            SuiteScore(
                suite=task.name,
                scored_by=task.score,
                questions=len(answers[task.name]),
                score=sum(record.score for record in answers[task.name]) / len(answers[task.name]),
                constant=constant,
                minimum=None if model is self._added else task.min,
            )
            for task, constant in zip(self._config.gate.tasks, self._constants, strict=True)
        ]

    def _compare_answers(self, model: NamedModel, reference: NamedModel) -> list[ScoreChange]:
        own, other = self._records[model.name], self._records[reference.name]
        return [
            ScoreChange.compare(other[task.name], own[task.name], task.max_drop)
            for task in self._config.gate.tasks
        ]

    def _compare_losses(self, model: NamedModel, reference: NamedModel) -> Validation | None:
        """Compare two models' losses, without the examples that either was trained on.

        None without data, and for models of different tokenizers.
        """
        if self._data is None:
            return None
        held_out, after, tokens = self._losses[model.name]
        _, base, reference_tokens = self._losses[reference.name]
        if not np.array_equal(tokens, reference_tokens):
            return None  # nats/token of different tokens are not comparable
        losses = held_out.make_losses(tokens, self._config.training.loss, before=base, after=after)
        seen, bounds = model.seen | reference.seen, self._config.gate
        losses = losses.leaving_out(seen.find_in(held_out.digests))
        is_known = seen.unknown is None
        return summarise_losses(
            losses, bounds, selected_on_same_data=False, are_rows_known=is_known
        )

    def _answered_questions(self) -> Iterator[AnsweredQuestion]:
        """Yield each question with the answers and scores of all models."""
        names = [model.name for model in self._models]
        for suite in self._suites:
            of_models = (self._records[name][suite.name] for name in names)
            for records in zip(*of_models, strict=True):
                first, named = records[0], dict(zip(names, records, strict=True))
                yield AnsweredQuestion(
                    suite=suite.name,
                    line=first.line,
                    question=first.question,
                    expected=first.expected,
                    answers={name: record.answer for name, record in named.items()},
                    scores={name: record.score for name, record in named.items()},
                )


def conclude_models(
    changes: Sequence[Sequence[ScoreChange]],
    losses: Sequence[Validation | None],
    noise: Literal["paired", "none"],
) -> Iterator[tuple[list[Conclusion], Conclusion | None]]:
    """Yield the conclusions on each model, such as `better`: one for each suite, and for its loss.

    All comparisons with the reference are corrected for their number together.

    changes: a row for each model: its change in each suite against the reference.
    losses: for each model, its comparison of losses; None without one.
    noise: as `gate.noise`; `none` takes the conclusions on losses as they are.
    """
    chances = []
    for row, loss in zip(changes, losses, strict=True):
        chances += [(change.fall, change.rise) for change in row]
        chances.append((NOT_TESTED, NOT_TESTED) if loss is None else _chances_of_loss(loss))
    is_worse = iter(find_beyond_chance([worse for worse, _ in chances]))
    is_better = iter(find_beyond_chance([better for _, better in chances]))
    for row, loss in zip(changes, losses, strict=True):
        words = [c.conclude(is_worse=next(is_worse), is_better=next(is_better)) for c in row]
        shown = {"is_worse": next(is_worse), "is_better": next(is_better)}
        if loss is None or noise == "none":
            yield words, None if loss is None else loss.conclusion
        else:
            yield words, _conclude_among_others(loss, **shown)


def _chances_of_loss(losses: ComparedLoss) -> tuple[Chance, Chance]:
    """Return the probabilities of such a rise, and of such a fall, of the loss by chance.

    They are computed by Student's t if the interval does not contain 0, and are one half otherwise.
    Without an interval nothing is tested.
    """
    if losses.interval is None or losses.standard_error is None or losses.difference is None:
        return NOT_TESTED, NOT_TESTED
    examples = losses.clusters or 0
    chance = Chance(chance_of_mean(abs(losses.difference), losses.standard_error, examples))
    low, high = losses.interval
    return chance if low > 0 else Chance(0.5), chance if high < 0 else Chance(0.5)


def _conclude_among_others(
    losses: ComparedLoss, *, is_worse: bool, is_better: bool
) -> Conclusion | None:
    """Return the conclusion for one of several comparisons, corrected for their number.

    `worse` and `better` need `is_worse` or `is_better`, the result of the test among all
    comparisons; otherwise they become `no_worse` or `inconclusive`.
    """
    conclusion, margin, high = losses.conclusion, losses.margin, losses.one_sided_high
    is_confirmed = is_worse if conclusion == "worse" else is_better
    if conclusion not in ("worse", "better") or is_confirmed:
        return conclusion
    is_within = high is not None and margin is not None and high <= margin
    return "no_worse" if is_within else "inconclusive"


def _form(model: NamedModel, models: Sequence[NamedModel]) -> tuple[Any, ...]:
    """Return a key that models share if one loaded base fits both; a base fits any adapter."""
    adapter = model.adapter or next(
        (other.adapter for other in models if other.model == model.model and other.adapter), None
    )
    if adapter is None:
        return (model.model,)
    meaning = adapter.meaning()
    shapes = sorted((name, tuple(tensor.shape)) for name, tensor in adapter.tensors.items())
    return (model.model, meaning["fine_tune_type"], meaning["scale"], *shapes)


def _require_fit(model: NamedModel, base: LoadedBase) -> None:
    adapter = model.adapter
    if adapter and (reasons := base_reasons(adapter, base.parameters, base.folder)):
        raise ConfigError(f"{model.name} does not fit {model.model}: {reasons[0].message}.")


def _ask(model: NamedModel, base: LoadedBase, suite: EncodedSuite) -> list[AnswerRecord]:
    """Return a model's answers to a suite; what is answered so far is logged as a stage."""
    total = len(suite.prompts)

    def tell(count: int) -> None:
        """Report that so many are answered."""
        text = "evaluate: %s has answered %d of %d questions of %s"
        stages.info(text, model.name, count, total, suite.suite.name)

    tell(0)
    return ask_model(AskedModel("candidate", base, model.adapter, on_answered=tell), [suite])
