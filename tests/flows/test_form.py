"""The schema that the UI makes its form from: every field has a word beside it, and choices."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate

from flows.finetune import finetune
from flows.promote import promote
from flows.reconcile import reconcile
from flows.rollback import rollback


def definitions(flow: Any) -> dict[str, dict[str, Any]]:
    return dict(parameter_schema(flow).model_dump()["definitions"])


def test_what_can_be_chosen_is_listed_and_other_keys_are_refused() -> None:
    found = definitions(finetune)
    assert found["RegistrySection"]["properties"]["promote"]["enum"] == [
        *("never", "always", "better", "approve")
    ]
    assert found["NestedSection"]["properties"]["fast"]["enum"] == ["shallow", "deep"]
    assert all(schema["additionalProperties"] is False for schema in found.values())


@pytest.mark.parametrize("flow", [finetune, promote, reconcile, rollback])
def test_fields_keep_the_order_of_the_schema_and_their_help_is_a_sentence(flow: Any) -> None:
    check_fields(flow)


def check_fields(flow: Any) -> None:
    """Assert the order of the fields, and that each has a title and a sentence."""
    for schema in definitions(flow).values():
        fields = schema.get("properties", {}).values()
        assert [field["position"] for field in fields] == list(range(len(fields)))
        assert all(field["title"] for field in fields)  # else a page shows the section's own name
        for field in fields:
            help_text = field["description"]
            assert help_text[0] == help_text[0].upper()
            assert help_text.endswith(".")


def test_model_and_data_come_first_and_have_to_be_given() -> None:
    schema = definitions(finetune)["FinetuneParameters"]
    assert list(schema["properties"])[:2] == ["model", "data"] == schema["required"]
    assert not any("default" in schema["properties"][name] for name in schema["required"])


def test_what_is_rarely_touched_is_not_shown_and_can_be_given_all_the_same() -> None:
    schema = parameter_schema(finetune).model_dump()
    shown = schema["definitions"]["FinetuneParameters"]["properties"]
    assert not {"train", "run_dir", "resume", "project_name", "trust_remote_code"} & set(shown)
    assert len(shown) < 30
    config: dict[str, Any] = {"model": "m", "data": "d", "train": True, "run_dir": "runs/x"}
    assert validate({"config": config}, schema) == []
    for wrong in ({"train": "perhaps"}, {"trian": True}, {"model": None}):
        assert validate({"config": config | wrong}, schema) != []
    assert validate({"config": {"model": "m"}}, schema) != []
