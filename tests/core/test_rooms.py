"""The table of rooms, and the parts that it names."""

from __future__ import annotations

from dataclasses import fields

import pytest

from nested_core import seams
from nested_core.gate.checks.judged import GateChecks
from nested_core.seams import Room


def list_parts() -> list[tuple[str, str]]:
    return [
        (point, name) for room in seams.list_rooms().values() for point, name in room.parts.items()
    ]


@pytest.mark.parametrize(("point", "name"), list_parts())
def test_a_part_is_an_instance_of_its_extension_point(point: str, name: str) -> None:
    of_core = [
        one for one in type(seams.load(name)).__mro__ if ".rooms." not in f"{one.__module__}."
    ]
    assert point in [one.__name__ for one in of_core]


def test_a_part_that_is_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(parts={"GateChecks": "nested_core.seams:Room"})
    monkeypatch.setattr(seams, "read_rooms", lambda: {"music": room})
    monkeypatch.setattr(seams, "is_there", lambda _: True)
    with pytest.raises(TypeError, match=r"nested_core.seams:Room, a part of the room music, is no"):
        list(seams.load_all(GateChecks))


def test_every_folder_of_a_room_has_its_entry() -> None:
    folders = {path.parent.name for path in seams.ROOMS.glob("*/ROOM.toml")}
    assert folders - seams.read_rooms().keys() == set()
    assert len(fields(Room)) <= 15
