"""Rooms: capabilities that can be deleted, and one static table of what each adds to the core.

A room is a folder here with its code and ROOM.toml, its commands and flows in flows/rooms/ROOM, its
tests in tests/rooms/ROOM. The table names parts by strings, `module:name`: no file of the core
imports a room, and nested_core/seams.py loads a part where it is used, if its room is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RoomLoss:
    """A value of `training.loss`: the rows that it is computed on, and how. It counts examples.

    unit: of its values, as pages and messages show it: "nats/example".
    max_kl: what `gate.max_kl` is where the configuration gives none.
    rows: its kinds of rows, a mapping of names to RowFormats (data/lines/example_parsing.py); only
        they are read.
    problems: a function of the configuration that gives what it asks of this loss and cannot have.
    make: a function of LossInputs (training/training_setup.py) that gives the Loss of a run.
    compare: a function of a LoadedBase and of the references to its parameters. What it gives has
        `compare`, as PredictionComparison (measure/losses/prediction_comparison.py) has it.
    pairs: a class, whose `of_config` takes a configuration; it has `split`, of an example's
        tokens and target mask that gives tokens and targets' places of its answers, and `of_pairs`,
        a function of likelihoods, the base's and numbers of tokens that gives losses.
    """

    unit: str
    max_kl: float
    rows: str
    problems: str
    make: str
    compare: str
    pairs: str


@dataclass(frozen=True, slots=True)
class Room:
    """What a room adds.

    commands: words of the command line; flows/rooms/ROOM/command.py adds their parsers.
    flags: of a command of the core or of another room, by its name; `add_flags` in
        flows/rooms/ROOM/command.py adds them to its parser.
    public_names: what `nested_core` offers from Python, each under its own name.
    keys: keys of the configuration that ask for it where they are not at their default.
    problems: a function of a configuration that gives what its keys cannot be given with.
    server_checks: what `doctor` says of the Prefect server of PREFECT_API_URL: a function without
        arguments, which yields lines as Check (flows/commands/check.py).
    why_silent: of a Prefect client, registry and name: why the server gets none of its events, as a
        sentence; None if it does.
    registry_checks: what `doctor` says of a registry: a function of its folder, which yields lines
        as Check.
    watcher: what it does around the flows: a class that is a Watcher (flows/flow_runs/watchers.py).
    model_format: a function of a path as a person gave it and of a temporary folder. It returns the
        NamedModel (nested_core/pipeline/named_models.py) there, None for a path of another format.
    model_card: a function that renders README.md of a version, of the name, the version, its
        provenance and its verdict.
    adapter_format: a class of AdapterFormat (nested_core/models/adapter_formats.py), by which
        adapters of another program are read and written.
    run_files: patterns of the files that it, or a service, writes in a run: their paths there.
    services: a class that is made of a configuration with `report_to`, and raises ConfigError for a
        service that cannot be used. Its `reporting` is a context around training.
    restart: a function that runs a command again where it is killed, as `run_again_where_killed`.
    memory_forecast: a function of a TrainingSetup and the bytes that there are, which gives a
        MemoryPlan (training/memory_plan.py).
    count_processes, train_in_processes: functions that count a run's processes, and train in
        several.
    reference_schedule, reference_trainer: the StepSchedule and the Trainer of a run under
        `training.reference`.
    layer_context: a context of a model in which its layers compute otherwise while it trains.
    plain_delta_rule: the formulas of gated delta nets that kernels are compared with.
    cuda_operations: the DeviceOperations of layers (kernels/device_operations.py) on CUDA.
    loss_curve: a function of the records of metrics.jsonl that draws their losses in characters.
    champion_page: a class that publishes an adapter's champion on Prefect.
    live_view: a function that draws a run in a terminal until it is done, of its RunProgress, its
        RunDirectory, the event that ends it and the lock of the view.
    kernel_folder: a function that has MLX compile its kernels into a folder of this process.
    around_training: as around_run, around loading and training alone, called after validation.
    around_run: a function that gives a context around all steps of a run, of its RunInProgress
        (pipeline/run_in_progress.py). It is called before the run has begun, and entered after.
    side_by_side: a class that loads a base and adapters of it, whose `ask` answers a prompt.
    warnings_before_start: a function of a configuration that gives warnings of it in a list.
    rate_refusal: a function of a configuration that raises ConfigError if a run would go on from
        the champion at too high a learning rate.
    explain_run: a function that says what a run of a configuration will do and cost, for rooms.
    run_measurement: a function that measures how fast a run is, for `explain`.
    blas_threads: a context of a loaded model in which its products have the quicker number of BLAS
        threads, on a machine that other programs use too.
    readers: functions that give the lines of JSON in a data file, by the end of its name.
    hub_tables: a function of DataSettings that gives name and lines of each split of a data set of
        the Hugging Face hub.
    text_checks: a class of checks of lines: `schema`, its columns; `find`, a function of the lines'
        texts (turns are joined by NUL) that gives them; and `add_findings`, a function of a file's
        lines and of the Findings.
    tokenizer_checks: a class, made of a TokenizerSource, that is called with an Example and its
        tokens, and gives Notes; `depends_on`, a function of the TokenizerSource, gives what these
        depend on beside the tokenizer's files.
    near_duplicates: a class of what is read with each line to find rows that nearly are another,
        of the rules that report them, and of `group`, a function of texts that gives the indices of
        those that nearly are one another in lists.
    data_tables: what `validate` shows of a data set: a function of DataSettings that gives blocks.
    gate_checks: Checks of the gate (nested_core/gate/checks/judged.py) of a run, with its base.
    earlier_examples: the class of the EarlierExamples (nested_core/data/earlier_examples.py).
    ancestor_digests: what a champion's ancestors are judged by: a function of registry, name and
        champion that gives their versions and the digests of what is kept of each.
    data_blocks: what the page of a run shows of its data: a function of a Run that gives Blocks.
    answer_tables: what stands beside the answers to an eval set: a function of its name and of
        (model, expected answer, answer, score) of each, which gives Blocks.
    losses: by the name that `training.loss` gives.
    suggested_loss: for `init`: a function of a row as JSON has it, which gives the loss that is
        made for such rows, or None.
    verdict_blocks: by the key in gate.json, what shows this block: an object with `rows` and
        `notes`, functions of the block and the verdict that give CheckRows and sentences.
    reasons: codes of the gate's checks, each with the name of the Outcome that it stands for.
    decide_question: of history, registry section, candidate and champion, the Decision on a version
        that needs a person's word: waiting, or declined already.
    may_be_approved: whether a gc keeps a version (its folder, version, history, age) for an answer.
    request_approval: asks a person in Prefect, of registry, name, version and the night's flow run.
    ask_person: what the flow `promote` does about a version that needs a person's word: a function
        of its parameters, registry and champion, which gives the state in which the flow ends.
    """

    commands: tuple[str, ...] = ()
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    public_names: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    problems: str | None = None
    server_checks: str | None = None
    why_silent: str | None = None
    registry_checks: str | None = None
    watcher: str | None = None
    model_format: str | None = None
    model_card: str | None = None
    adapter_format: str | None = None
    run_files: tuple[str, ...] = ()
    services: str | None = None
    restart: str | None = None
    memory_forecast: str | None = None
    count_processes: str | None = None
    train_in_processes: str | None = None
    reference_schedule: str | None = None
    reference_trainer: str | None = None
    layer_context: str | None = None
    plain_delta_rule: str | None = None
    cuda_operations: str | None = None
    loss_curve: str | None = None
    champion_page: str | None = None
    live_view: str | None = None
    kernel_folder: str | None = None
    around_training: str | None = None
    around_run: str | None = None
    side_by_side: str | None = None
    warnings_before_start: str | None = None
    rate_refusal: str | None = None
    explain_run: str | None = None
    run_measurement: str | None = None
    blas_threads: str | None = None
    readers: Mapping[str, str] = field(default_factory=dict)
    hub_tables: str | None = None
    text_checks: str | None = None
    tokenizer_checks: str | None = None
    near_duplicates: str | None = None
    data_tables: str | None = None
    gate_checks: str | None = None
    earlier_examples: str | None = None
    ancestor_digests: str | None = None
    data_blocks: str | None = None
    answer_tables: str | None = None
    losses: Mapping[str, RoomLoss] = field(default_factory=dict)
    suggested_loss: str | None = None
    verdict_blocks: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    decide_question: str | None = None
    may_be_approved: str | None = None
    request_approval: str | None = None
    ask_person: str | None = None


ROOMS: Mapping[str, Room] = {
    "audit": Room(flags={"verify": ("--model",)}),
    "approval": Room(
        decide_question="nested_core.rooms.approval.answers:decide_question",
        may_be_approved="nested_core.rooms.approval.answers:may_be_approved",
        request_approval="flows.rooms.approval.questions:request_approval",
        ask_person="flows.rooms.approval.asking:ask_person",
    ),
    "deploy": Room(
        commands=("deploy",),
        server_checks="flows.rooms.deploy.server_checks:iterate_server_checks",
        why_silent="flows.rooms.deploy.deployed_registries:why_silent",
    ),
    "chat": Room(commands=("chat",), side_by_side="nested_core.rooms.chat.side_by_side:SideBySide"),
    "compare": Room(
        commands=("compare",),
        public_names=(
            "nested_core.rooms.compare.comparison:RunComparison",
            "nested_core.rooms.compare.comparison:compare_runs",
        ),
    ),
    "doctor": Room(commands=("doctor",)),
    "evaluate": Room(
        commands=("evaluate",),
        public_names=(
            "nested_core.rooms.evaluate.evaluating:evaluate",
            "nested_core.rooms.evaluate.page:Evaluation",
        ),
    ),
    "export": Room(
        commands=("export", "card"),
        public_names=(
            "nested_core.rooms.export.exporting:Export",
            "nested_core.rooms.export.exporting:export",
        ),
        model_format="nested_core.rooms.export.named_artefact:find_artefact",
        model_card="nested_core.rooms.export.adapter_card:render_card",
    ),
    "memory": Room(memory_forecast="nested_core.rooms.memory.forecast:forecast_memory"),
    "fused": Room(keys=("gate.check_fused",), gate_checks="nested_core.rooms.fused.fused:CHECKS"),
    "housekeeping": Room(
        flags={"runs": ("--prune", "--keep", "--unregistered", "--dry-run")},
        registry_checks="flows.rooms.housekeeping.checks:iterate_housekeeping_checks",
    ),
    "hub": Room(hub_tables="nested_core.rooms.hub.hub_datasets:open_tables"),
    "live": Room(
        live_view="flows.rooms.live.live_view:draw_until_done",
        loss_curve="flows.rooms.live.loss_curve:draw_curve",
    ),
    "mlflow": Room(commands=("export-mlflow",)),
    "nights": Room(commands=("registry",), watcher="flows.rooms.nights.watcher:NightWatcher"),
    "planning": Room(
        commands=("init", "explain"),
        explain_run="nested_core.rooms.planning.run_explanation:explain_run",
        warnings_before_start="nested_core.rooms.planning.learning_rate_rule:warn_of_learning_rate",
        rate_refusal="nested_core.rooms.planning.learning_rate_rule:require_usable_rate",
        champion_page="flows.rooms.nights.champion_page:ChampionPage",
    ),
    "peft": Room(
        commands=("import-peft", "export-peft"),
        adapter_format="nested_core.rooms.peft.adapter_format:PeftFormat",
    ),
    "serve": Room(commands=("serve",)),
    "near_duplicates": Room(
        near_duplicates="nested_core.rooms.near_duplicates.related_rows:NearDuplicates"
    ),
    "secrets": Room(text_checks="nested_core.rooms.secrets.rules:SensitiveData"),
    "suspect_rows": Room(
        text_checks="nested_core.rooms.suspect_rows.text_checks:SuspectTexts",
        tokenizer_checks="nested_core.rooms.suspect_rows.tokenizer_checks:TokenizerChecks",
    ),
    "restart": Room(restart="nested_core.rooms.restart.restarting:run_again_where_killed"),
    "services": Room(
        services="nested_core.rooms.services.reporting_services:Services",
        around_run="nested_core.rooms.services.reporting_services:attaching_verdict_of",
        run_files=(  # of wandb and swanlab; one that is missing here keeps a run from removal
            r"wandb/(offline-)?run-\d{8}_\d{6}-[\w-]+/(run-[\w-]+\.wandb|logs/debug[\w-]*\.log"
            r"|files/(config\.yaml|output\.log|requirements\.txt|wandb-(metadata|summary)\.json))",
            r"swanlog/run-\d{8}_\d{6}-\w+/(backup\.swanlog|logs/console\.log"
            r"|files/(config\.yaml|requirements\.txt|swanlog-metadata\.json))",
        ),
    ),
    "sweep": Room(commands=("sweep",)),
    "ranks": Room(
        problems="nested_core.rooms.ranks.refused_keys:iterate_problems",
        count_processes="nested_core.rooms.ranks.mlx_launch:count_ranks",
        train_in_processes="nested_core.rooms.ranks.rank_group:train_in_ranks",
    ),
    "kernel_folder": Room(
        kernel_folder="nested_core.rooms.kernel_folder.compiled_kernels:use_private_kernel_folder",
        around_training="nested_core.rooms.kernel_folder.first_kernels:compiling_kernels_of",
    ),
    "delta_nets": Room(
        layer_context="nested_core.rooms.delta_nets.layers:using_delta_nets",
        plain_delta_rule="nested_core.rooms.delta_nets.gated_delta:PlainDeltaRule",
    ),
    "cuda": Room(cuda_operations="nested_core.rooms.cuda.operations:CUDA_OPERATIONS"),
    "reference": Room(
        keys=("training.reference",),
        problems="nested_core.rooms.reference.refused_keys:iterate_problems",
        reference_schedule="nested_core.rooms.reference.mlx_lm_schedule:MlxLmSchedule",
        reference_trainer="nested_core.rooms.reference.mlx_lm_trainer:MlxLmTrainer",
    ),
    "minutes": Room(
        keys=("training.minutes",),
        flags={command: ("--minutes",) for command in ("train", "run", "explain")},
        problems="nested_core.rooms.minutes.refused_keys:iterate_problems",
        around_run="nested_core.rooms.minutes.timed_training:holding_to_minutes",
        run_measurement="nested_core.rooms.minutes.measured_run:measure_run",
        blas_threads="nested_core.rooms.minutes.blas_threads:using_quicker_blas_threads",
    ),
    "replay": Room(
        keys=(
            *("continual.replay", "continual.policy", "continual.window"),
            "gate.max_ancestor_loss_increase",
        ),
        gate_checks="nested_core.rooms.replay.rebuilt_check:CHECKS",
        earlier_examples="nested_core.rooms.replay.replayed_run:ReplayOfRun",
        ancestor_digests="nested_core.rooms.replay.ancestor_examples:list_ancestor_digests",
        data_blocks="nested_core.rooms.replay.page:describe_replay",
    ),
    "tables": Room(
        flags={
            "init": (
                *("--split", "--suite", "--prompt-feature", "--completion-feature"),
                *("--completion-features", "--template", "--system", "--system-file"),
                "--champion",
            )
        },
        readers={".xlsx": "nested_core.rooms.tables.workbook:read_workbook"},
        data_tables="nested_core.rooms.tables.labels:tabulate_labels_of_data",
        answer_tables="nested_core.rooms.tables.labels:tabulate_labels_of_answers",
    ),
    "preferences": Room(
        keys=("gate.max_chosen_fall",),
        losses={
            name: RoomLoss(
                unit="nats/example",
                max_kl=4.0,
                rows="nested_core.rooms.preferences.answer_rows:PAIRS",
                problems="nested_core.rooms.preferences.loss_settings:iterate_problems",
                make="nested_core.rooms.preferences.training_loss:make_loss",
                compare="nested_core.rooms.preferences.training_loss:HeldOutComparison",
                pairs="nested_core.rooms.preferences.training_loss:PreferenceLoss",
            )
            for name in ("dpo", "orpo", "simpo")
        },
        suggested_loss="nested_core.rooms.preferences.answer_rows:suggest_loss",
        run_files=(r"rooms/preferences/reference-likelihoods\.json",),
        gate_checks="nested_core.rooms.preferences.gate_check:CHECKS",
        verdict_blocks={"preferences": "nested_core.rooms.preferences.verdict_block:SHOWN"},
        reasons={"preference_not_learnt": "ANSWERS"},
    ),
}
