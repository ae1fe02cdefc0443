"""A split as tokens: flat arrays, one example after the other.

Holds them and hands them out by example; it makes none and judges none.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class TokenizedSplit:
    """All examples of a split, one after the other.

    tokens: int32 [sum of lengths]; supervised: bool [sum of lengths], whether the token is learnt,
    never so at the first position of an example, which nothing predicts; starts: int64 [n + 1],
    where each example begins and the last ends; lines: int32 [n], the number that a person knows
    each example by in its file. `maps` are the files that hold the arrays, if any.
    """

    tokens: Int32
    supervised: Bool
    starts: Int64
    lines: Int32
    maps: tuple[mmap.mmap, ...] = ()

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Int64:
        """Tokens in each example, int64 [n]."""
        return np.diff(self.starts)

    def example(self, index: int) -> Int32:
        """The tokens of one example, int32 [length], as a view."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def supervision(self, index: int) -> Bool:
        """Which tokens of one example are learnt, bool [length], as a view."""
        return self.supervised[self.starts[index] : self.starts[index + 1]]

    def give_back(self) -> None:
        """Let go of the pages of the files that were read, so that none stay in this process."""
        for mapped in self.maps:
            mapped.madvise(mmap.MADV_DONTNEED)
