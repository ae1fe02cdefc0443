"""The schema that the UI makes its form from: every field has a word beside it, and choices."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema

from flows.finetune import finetune
from flows.promote import promote
from flows.reconcile import reconcile
from flows.rollback import rollback
from flows.sweep import sweep


def definitions(flow: Any) -> dict[str, dict[str, Any]]:
    return dict(parameter_schema(flow).model_dump()["definitions"])


@pytest.mark.parametrize("flow", [finetune, promote, reconcile, rollback, sweep])
def test_every_field_of_every_flow_has_a_description(flow: Any) -> None:
    undescribed = [
        f"{title}.{name}"
        for title, schema in definitions(flow).items()
        for name, field in schema.get("properties", {}).items()
        if not field.get("description")
    ]
    assert undescribed == []


def test_what_can_be_chosen_is_listed_and_other_keys_are_refused() -> None:
    found = definitions(finetune)
    assert found["RegistrySection"]["properties"]["promote"]["enum"] == [
        *("never", "always", "better", "approve")
    ]
    assert found["NestedSection"]["properties"]["fast"]["enum"] == ["shallow", "deep"]
    assert all(schema["additionalProperties"] is False for schema in found.values())
