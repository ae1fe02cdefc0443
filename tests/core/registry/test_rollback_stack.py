"""The stack of champions behaves as a list that is filtered, in less time."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from nested_core.registry.ledger import RollbackStack

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["push", "push", "pop", "remove"]), st.sampled_from("abcd")),
    max_size=40,
)


@given(actions=ACTIONS)
def test_it_is_a_list_without_what_was_removed(actions: list[tuple[str, str]]) -> None:
    stack = RollbackStack()
    expected: list[str] = []
    for action, version in actions:
        if action == "push":
            stack.push(version)
            expected += [] if expected[-1:] == [version] else [version]
        elif action == "pop" and expected:
            stack.pop()
            expected.pop()
        elif action == "remove":
            stack.remove(version)
            expected = [left for left, _ in groupby(v for v in expected if v != version)]
        assert stack.second() == (expected[-2] if len(expected) > 1 else None)
