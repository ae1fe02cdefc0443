"""The champions that rollbacks go back through, as a stack that versions can be taken out of.

A linked list: removing a version takes time for the places that it has, not for all of the stack.
"""

from __future__ import annotations

NO_PLACE = -1


class RollbackStack:
    """Versions from the first champion to the present one, which is on top."""

    def __init__(self) -> None:
        # A place for each push, and the places below and above it that are still in the stack.
        self._versions: list[str] = []
        self._below: list[int] = []
        self._above: list[int] = []
        self._is_in: list[bool] = []
        self._top = NO_PLACE

        # Where each version was pushed, and places that may hold the same as the one below.
        self._places: dict[str, list[int]] = {}
        self._repeats: list[int] = []

    def push(self, version: str) -> None:
        """Put a version on top."""
        place = len(self._versions)
        self._versions.append(version)
        self._below.append(self._top)
        self._above.append(NO_PLACE)
        self._is_in.append(True)
        self._places.setdefault(version, []).append(place)
        if self._top != NO_PLACE:
            self._above[self._top] = place
            self._repeats.append(place)
        self._top = place

    def pop(self) -> None:
        """Take the top off."""
        self._unlink(self._top)

    def top(self) -> str | None:
        """The version on top, or None."""
        return None if self._top == NO_PLACE else self._versions[self._top]

    def second(self) -> str | None:
        """The version below the top, or None."""
        below = NO_PLACE if self._top == NO_PLACE else self._below[self._top]
        return None if below == NO_PLACE else self._versions[below]

    def remove(self, version: str | None) -> None:
        """Take a version out wherever it stands; of equal neighbours one stays."""
        for place in self._places.pop(version or "", ()):
            self._unlink(place)
        while self._repeats:
            place = self._repeats.pop()
            below = self._below[place]
            is_repeat = below != NO_PLACE and self._versions[below] == self._versions[place]
            if self._is_in[place] and is_repeat:
                self._unlink(place)

    def _unlink(self, place: int) -> None:
        if not self._is_in[place]:
            return
        self._is_in[place] = False
        below, above = self._below[place], self._above[place]
        if below != NO_PLACE:
            self._above[below] = above
        if above == NO_PLACE:
            self._top = below
        else:
            self._below[above] = below
            self._repeats.append(above)
