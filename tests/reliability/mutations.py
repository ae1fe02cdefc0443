"""Damage to a finished run's adapter and checkpoint folders: bits, bytes, files, and manifests.

Files of a copy are hard links to the original, so that a copy costs nothing; a mutation replaces
the file that it changes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from nested_core.storage.checkpoint_verification import list_checkpoints
from nested_core.storage.manifest import MANIFEST_NAME, write_manifest
from nested_core.storage.run_directory import RunDirectory

Mutation = Callable[[RunDirectory, random.Random], None]


def copy_run(original: Path, target: Path) -> RunDirectory:
    """A copy whose files are links."""
    shutil.copytree(original, target, copy_function=os.link)
    return RunDirectory(target)


def contents(run: RunDirectory) -> dict[str, bytes | None]:
    """Every file of the run's adapter and checkpoint folders; None for a folder."""
    folders = (run.initial, run.adapter, run.checkpoints)
    return {
        str(path.relative_to(run.path)): path.read_bytes() if path.is_file() else None
        for folder in folders
        for path in sorted(folder.rglob("*"))
    }


def offered(run: RunDirectory) -> Path:
    """The one checkpoint of a short run."""
    (path,) = list_checkpoints(run.checkpoints)
    return path


def _any_file(run: RunDirectory, dice: random.Random) -> Path:
    """A file of a folder chosen first, so that each folder is hit as often."""
    folder = dice.choice([run.initial, run.adapter, offered(run)])
    return dice.choice(sorted(folder.iterdir()))


def _replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _edit(change: Callable[[bytearray, random.Random], None]) -> Mutation:
    def apply(run: RunDirectory, dice: random.Random) -> None:
        path = _any_file(run, dice)
        content = bytearray(path.read_bytes())
        change(content, dice)
        _replace(path, bytes(content))

    apply.__name__ = change.__name__
    return apply


def flip_a_bit(content: bytearray, dice: random.Random) -> None:
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def flip_a_bit_near_the_start(content: bytearray, dice: random.Random) -> None:
    content[dice.randrange(min(64, len(content)))] ^= 1 << dice.randrange(8)


def flip_many_bits(content: bytearray, dice: random.Random) -> None:
    for _ in range(dice.randint(2, 40)):
        flip_a_bit(content, dice)


def truncate(content: bytearray, dice: random.Random) -> None:
    del content[dice.randrange(len(content)) :]


def zero_a_range(content: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(content))
    end = min(len(content), start + dice.choice([1, 8, 512, 4096, len(content)]))
    content[start:end] = bytes(end - start)


def zero_it_all(content: bytearray, dice: random.Random) -> None:
    content[:] = bytes(len(content))


def append(content: bytearray, dice: random.Random) -> None:
    content += dice.choice([b"\0", b"\n", b" ", dice.randbytes(dice.randint(1, 600))])


def insert(content: bytearray, dice: random.Random) -> None:
    place = dice.randrange(len(content))
    content[place:place] = dice.randbytes(dice.randint(1, 9))


def repeat_a_piece(content: bytearray, dice: random.Random) -> None:
    start, length = dice.randrange(len(content)), dice.randint(1, 200)
    content[start:start] = content[start : start + length]


def delete_a_file(run: RunDirectory, dice: random.Random) -> None:
    _any_file(run, dice).unlink()


def delete_a_folder(run: RunDirectory, dice: random.Random) -> None:
    shutil.rmtree(dice.choice([run.initial, run.adapter, offered(run)]))


def a_folder_in_a_files_place(run: RunDirectory, dice: random.Random) -> None:
    path = _any_file(run, dice)
    path.unlink()
    path.mkdir()


def rename_a_file(run: RunDirectory, dice: random.Random) -> None:
    path = _any_file(run, dice)
    path.rename(path.with_name(dice.choice([path.name.upper(), path.name + "~", "." + path.name])))


def add_to_the_checkpoint(run: RunDirectory, dice: random.Random) -> None:
    (offered(run) / dice.choice(["extra", "adapters.npz", ".hidden"])).write_bytes(b"\0")


def link_in_the_checkpoint(run: RunDirectory, dice: random.Random) -> None:
    path = dice.choice(sorted(offered(run).iterdir()))
    kept = path.rename(run.path / "kept")
    path.symlink_to(kept)


def swap_two_files(run: RunDirectory, dice: random.Random) -> None:
    one, other = _any_file(run, dice), _any_file(run, dice)
    before, after = one.read_bytes(), other.read_bytes()
    _replace(one, after)
    _replace(other, before)


def swap_two_folders(run: RunDirectory, dice: random.Random) -> None:
    one, other = dice.sample([run.initial, run.adapter, offered(run)], 2)
    aside = one.rename(run.path / "aside")
    other.rename(one)
    aside.rename(other)


def adapter_over_its_initial_file(run: RunDirectory, dice: random.Random) -> None:
    _replace(
        run.initial / "adapters.safetensors", (run.adapter / "adapters.safetensors").read_bytes()
    )


def _edit_manifest(manifest: dict[str, Any], dice: random.Random) -> None:
    """Change what it says of a file or of itself."""
    files = manifest["files"]
    name = dice.choice(sorted(files))
    change = dice.randrange(6)
    if change == 0:
        del files[name]
    elif change == 1:
        files[name]["bytes"] += dice.choice([-1, 1, 2**40])
    elif change == 2:
        files[name]["sha256"] = dice.randbytes(32).hex()
    elif change == 3:
        files[dice.choice(["../../tiers.json", "/etc/passwd", "new", "\0"])] = files[name]
    elif change == 4:
        manifest["facts"] = dice.choice([{}, {"step": 7}, [], None, {"step": "8"}])
    else:
        manifest[dice.choice(["digest", "files", "more"])] = dice.choice(["", {}, 0, "0" * 64])


def edit_the_manifest(run: RunDirectory, dice: random.Random) -> None:
    path = offered(run) / MANIFEST_NAME
    manifest = json.loads(path.read_bytes())
    _edit_manifest(manifest, dice)
    _replace(path, json.dumps(manifest, indent=dice.choice([2, None])).encode())


def another_manifest_that_agrees(run: RunDirectory, dice: random.Random) -> None:
    """The hash of the manifest is right; only what the folder is held to from outside is not."""
    folder = offered(run)
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder, dice.choice([{"step": 9}, {"step": 8, "more": 1}, {}]))


def _agreeing(run: RunDirectory, path: Path, content: bytes) -> None:
    """Replace a file of the checkpoint, and its manifest by one that agrees with it."""
    _replace(path, content)
    (path.parent / MANIFEST_NAME).unlink()
    write_manifest(path.parent, {"step": 8})


def edited_state_and_its_manifest(run: RunDirectory, dice: random.Random) -> None:
    path = offered(run) / "state.json"
    state = json.loads(path.read_bytes())
    key = dice.choice(sorted(state))
    state[key] = dice.choice([None, 0, 7, "x", [], {}, [1], {"initial": "0" * 64}, -1, 1e300])
    if dice.random() < 0.2:
        del state[key]
    _agreeing(run, path, json.dumps(state).encode())


def edited_tensors_and_their_manifest(run: RunDirectory, dice: random.Random) -> None:
    """One value, one name or one dtype of a checkpoint, and often the same in adapter/."""
    path = offered(run) / dice.choice(["adapters.safetensors", "optimizer.safetensors"])
    tensors = load_file(path)
    name = dice.choice(sorted(tensors))
    change = dice.randrange(4)
    if change == 0:
        tensors[name] = np.asarray(tensors[name] + 1)
    elif change == 1:
        tensors[name + "x"] = tensors.pop(name)
    elif change == 2:
        del tensors[name]
    else:
        tensors[name] = np.asarray(tensors[name].astype("f2"))
    written = run.path / "written.safetensors"
    save_file(tensors, written, metadata={"format": "mlx"})
    _agreeing(run, path, written.read_bytes())
    if path.name == "adapters.safetensors" and dice.random() < 0.5:
        _replace(run.adapter / path.name, written.read_bytes())


def a_configuration_that_means_the_same(run: RunDirectory, dice: random.Random) -> None:
    """Nothing that the digest covers: it is not the file that was written all the same."""
    path = dice.choice([run.initial, run.adapter]) / "adapter_config.json"
    config = json.loads(path.read_bytes())
    change = dice.choice([{"seed": 99}, {"note": "mine"}, {}])
    _replace(path, json.dumps(config | change, indent=1).encode())


def a_configuration_that_means_something_else(run: RunDirectory, dice: random.Random) -> None:
    path = dice.choice([run.initial, run.adapter]) / "adapter_config.json"
    config = json.loads(path.read_bytes())
    key = dice.choice(["rank", "scale", "keys", "dropout"])
    config["lora_parameters"][key] = dice.choice([0, 3, -1, 1e9, None, "8", ["x"], [], 0.5])
    _replace(path, json.dumps(config).encode())


BYTE_EDITS = [flip_a_bit, flip_a_bit_near_the_start, flip_many_bits, truncate, zero_a_range]
BYTE_EDITS += [zero_it_all, append, insert, repeat_a_piece]
FILES: list[Mutation] = [delete_a_file, delete_a_folder, a_folder_in_a_files_place, rename_a_file]
FILES += [add_to_the_checkpoint, link_in_the_checkpoint, swap_two_files, swap_two_folders]
FILES += [adapter_over_its_initial_file, edit_the_manifest, another_manifest_that_agrees]
FILES += [edited_state_and_its_manifest, edited_tensors_and_their_manifest]
FILES += [a_configuration_that_means_the_same, a_configuration_that_means_something_else]
MUTATIONS: list[Mutation] = [*map(_edit, BYTE_EDITS), *FILES]


def mutate(original: Path, target: Path, number: int) -> tuple[str, RunDirectory]:
    """Mutation `number` of a run, which differs from it for certain; its name and the copy."""
    dice, change = random.Random(number), MUTATIONS[number % len(MUTATIONS)]
    before = contents(RunDirectory(original))
    while True:
        run = copy_run(original, target)
        change(run, dice)
        if contents(run) != before or change is link_in_the_checkpoint:
            return change.__name__, run
        shutil.rmtree(target)
