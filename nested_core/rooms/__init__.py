"""Rooms: capabilities that can be deleted and added.

A room is a folder here with its code and ROOM.toml, its commands and flows in flows/rooms/ROOM, its
tests in tests/rooms/ROOM. No file of the core imports a room: ROOMS.toml says what each adds, and
nested_core/seams.py finds it.

What a room does beyond commands it does at an extension point: a class of the core, in the file
that asks rooms for it. The room makes an instance, its part, and mypy compares the functions in it
with the types that the class gives them. The points, each with what a room does there:

    ConfigRules (config/schema.py)                refuses keys that cannot be given together
    RowChecks (data/room_checks.py)               reports rows of a data set by their texts
    NearDuplicates (data/room_checks.py)          finds held-out rows that nearly are a row of train
    TokenizerChecks (data/tokens/text_notes.py)   reports rows by their tokens
    TableReader (data/sources/file_formats.py)    reads data files that are not JSON lines
    HubReader (data/sources/split_files.py)       reads data sets of the Hugging Face hub
    RowFormats, LossRules, TrainingLoss, HeldOutLoss   a value of `training.loss`: its rows, refused
                                                  keys, training, and the gate's measurement
    GateChecks (gate/checks/judged.py)            judges an adapter
    VerdictBlock (records/verdict.py)             shows what a check of its own wrote to gate.json
    PageBlocks (report/page_blocks.py)            shows more on the pages of runs and data sets
    AroundRun (pipeline/run_in_progress.py)       does something before and after steps of a run
    StartRules (pipeline/preflight.py)            warns before a run, or keeps it from starting
    AdapterFormat, ModelFormat, ModelCard         adapters and models of other programs, model cards
    DoctorChecks (flows/commands/check.py)        looks at a Prefect server for doctor
    Watcher (flows/flow_runs/watchers.py)         does something around Prefect's flows

The others are one thing that one room does: DeviceOperations, ModelLayers, KernelFolder,
MemoryForecaster, Processes, ReportingServices, ReferenceSchedule, ReferenceTrainer, Replay,
Approval, Asking, Chat, ServerPages, LiveView, Restart, SuiteScorer and
OtherTrainersKeys.
"""
