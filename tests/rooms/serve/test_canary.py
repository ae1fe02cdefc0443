"""serve's canary: a fault of serving is found before a client is answered, and may roll back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm import load

from nested_core.models.base_model import TrainedTokenizer
from nested_core.models.lora_attachment import copy_with_adapter
from nested_core.registry import VerifiedVersion, read_champion
from nested_core.registry.versions import version_folder
from nested_core.rooms.serve import canary_check, served_version
from nested_core.rooms.serve.canary_check import (
    CanaryFailed,
    check_canary,
    require_version_in_layers,
)
from nested_core.rooms.serve.served_version import ServedVersion
from nested_core.storage.adapter import Adapter, read_adapter
from nested_core.storage.canary_file import CANARY_NAME, Canary, parse_canary
from tests.left_out import slow_except
from tests.registry_care import audit
from tests.rooms.serve.test_following import arrays_of, wait_for
from tests.rooms.serve.versions import NAME, Client, serving, settings
from tests.waiting import wait_until

pytestmark = pytest.mark.slow("serves champions that are asked before they are served")

Promote = Callable[..., str]


def leave_one_tensor_out(monkeypatch: pytest.MonkeyPatch, version: str | None = None) -> None:
    """Plant the fault that one LoRA tensor (of a version) is not put into the model."""

    def attach(base: Any, adapter: Adapter) -> Any:
        model = copy_with_adapter(base, adapter)
        if version in (None, adapter.path.name):
            name = next(name for name in adapter.tensors if "lora_b" in name)
            model.load_weights([(name, mx.zeros_like(arrays_of(model)[name]))], strict=False)
        return model

    monkeypatch.setattr("nested_core.rooms.serve.served_version.copy_with_adapter", attach)


def quantise_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant the fault that a version is built on a base of fewer bits than it was judged on."""
    build = ServedVersion.build_model
    monkeypatch.setattr(
        ServedVersion, "build_model", lambda version, base: build(version, _quantised(base))
    )


def _quantised(base: Any) -> Any:
    nn.quantize(base, group_size=32, bits=4)
    return base


def refusals(client: Client) -> Any:
    """What the server says that it refuses now; None for nothing."""
    return client.health()["names"][NAME]["refused"]


def refused(client: Client) -> dict[str, str]:
    """What the server says that it refuses, once it does."""
    wait_until(lambda: refusals(client) is not None, "it is refused")
    return dict(refusals(client))


def test_a_version_of_which_a_tensor_is_not_swapped_is_refused_until_that_is_mended(
    promote: Promote, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = promote(1)
    with serving(settings(registry, "--name", NAME)) as client:
        before = client.chat(NAME).text
        with monkeypatch.context() as patch:
            leave_one_tensor_out(patch)
            second = promote(2)
            said = refused(client)
        assert said["version"] == second
        assert "canary: 1 of 36 tensors in the layers are not those of" in said["reason"]
        reply = client.chat(NAME)
        assert (reply.text, reply.version) == (before, first)
        pinned = client.chat(f"{NAME}@{second}")
        assert (pinned.status, said["reason"] in pinned.json()["error"]["message"]) == (404, True)
        assert read_champion(registry, NAME) == second  # the server changes no registry
        assert not (registry / NAME / "serving").exists()
        client.server.follower._failed_canaries.clear()  # as if a minute were over
        client.server.follower.names[NAME].retry_at = 0.0
        wait_for(client, second)
        assert client.chat(f"{NAME}@{second}").version == second


def test_a_base_that_is_quantised_otherwise_than_the_judged_one_is_found(
    promote: Promote, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(1)
    with serving(settings(registry, "--name", NAME)) as client, monkeypatch.context() as patch:
        quantise_base(patch)
        promote(2)
        said = refused(client)["reason"]
        assert "are neither the version's nor those that the base was loaded with" in said


@pytest.mark.parametrize(
    "plant",
    slow_except(
        [leave_one_tensor_out, quantise_base], leave_one_tensor_out, reason="swaps a second version"
    ),
)
def test_logits_find_what_no_comparison_of_tensors_does(
    plant, promote, registry, monkeypatch
) -> None:
    promote(1)
    with serving(settings(registry, "--name", NAME)) as client, monkeypatch.context() as patch:
        patch.setattr(served_version, "require_version_in_layers", lambda *_: None)
        plant(patch)
        promote(2)
        assert "canary: the logits are not those that were" in refused(client)["reason"]


def test_each_single_tensor_that_is_not_swapped_is_found_whatever_it_does_to_logits(
    runs: dict[int, Path], base: Path
) -> None:
    loaded: Any = load(str(base))[0]
    base_arrays = {id(array) for array in arrays_of(loaded).values()}
    stored = read_adapter(runs[1] / "adapter").tensors
    model = build(runs[1], loaded)
    require_version_in_layers(model, stored, base_arrays)
    right, earlier = arrays_of(model), arrays_of(build(runs[2], loaded))
    assert len(stored) == 36
    for name in stored:
        for left in (earlier[name], mx.zeros_like(right[name]), one_bit_off(right[name])):
            model.load_weights([(name, left)], strict=False)
            with pytest.raises(CanaryFailed, match="1 of 36 tensors") as caught:
                require_version_in_layers(model, stored, base_arrays)
            assert str(caught.value).endswith(f"such as {name}")
        model.load_weights([(name, right[name])], strict=False)
    require_version_in_layers(model, stored, base_arrays)


@pytest.mark.slow("a server of its own")
def test_versions_without_a_canary_and_those_asked_for_by_name_are_compared_too(
    promote: Promote, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, first = promote(4), promote(1)
    with serving(settings(registry, "--name", NAME)) as client:
        answer = client.chat(NAME).text
        leave_one_tensor_out(monkeypatch)
        asked = client.chat(f"{NAME}@{other}")
        assert (asked.status, "tensors in the layers are not" in asked.body) == (404, True)
        reply = client.chat(NAME)
        assert (reply.text, reply.version) == (answer, first)
        third = promote(3)
        assert refused(client)["version"] == third
        assert client.chat(NAME).version == first


def build(run: Path, base: Any) -> Any:
    """The model of a run's adapter, as the server builds it."""
    verified = VerifiedVersion("0" * 64, read_adapter(run / "adapter"), None, TrainedTokenizer())
    return ServedVersion(NAME, "0" * 64, verified).build_model(base)


def one_bit_off(array: mx.array) -> mx.array:
    """A tensor whose first number has another last bit: a difference of about 1e-8."""
    words = array.view(mx.uint32)
    words[0, 0] = words[0, 0] ^ 1
    return words.view(mx.float32)


@pytest.mark.slow("answers with several adapters")
def test_one_answer_may_differ_and_two_may_not(runs: dict[int, Path], base: Path) -> None:
    loaded: Any = load(str(base))[0]
    model = build(runs[1], loaded)
    canary = parse_canary((runs[1] / CANARY_NAME).read_bytes(), "the canary")
    assert len(canary.questions) == 4

    def differing(count: int) -> Canary:
        """The canary with so many answers whose last token is another."""
        wrong = [replace(q, answer=(*q.answer[:-1], q.answer[-1] ^ 1)) for q in canary.questions]
        return replace(canary, questions=(*wrong[:count], *canary.questions[count:]))

    list(check_canary(canary, model))
    list(check_canary(differing(1), model))
    with pytest.raises(CanaryFailed, match="2 of 4 answers .* line 1 of the eval set capitals"):
        list(check_canary(differing(2), model))


@pytest.mark.slow("answers with several adapters")
def test_logits_that_another_computation_recorded_may_be_as_far_off_as_rounding(
    promote: Promote, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(1)
    distances = iter([0.02, 0.02, 0.06])
    monkeypatch.setattr(canary_check, "relative_distance", lambda *_: next(distances))
    with pytest.raises(CanaryFailed, match=r"distance 0.02, tolerance 0.001"):
        start(registry)
    other = {"device": "cpu another", "blas": "MLX's", "mlx": "1", "mlx-lm": "1"}
    monkeypatch.setattr(canary_check, "describe_computation", lambda: other)
    start(registry)
    with pytest.raises(CanaryFailed, match=r"distance 0.06, tolerance 0.05"):
        start(registry)


def start(registry: Path) -> None:
    """Start a server, which asks the champion's canary, and end it."""
    with serving(settings(registry, "--name", NAME)):
        pass


def test_a_champion_whose_canary_fails_at_the_start_gives_way_to_the_one_before(
    promote: Promote, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = promote(1), promote(2)
    leave_one_tensor_out(monkeypatch, second)
    with serving(settings(registry, "--name", NAME)) as client:
        assert client.chat(NAME).version == first
        assert refused(client)["version"] == second


def test_without_a_champion_before_it_a_server_does_not_start_on_a_failed_canary(
    promote: Promote, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(1)
    leave_one_tensor_out(monkeypatch)
    with pytest.raises(CanaryFailed, match="no champion before it that could be"):
        start(registry)
    promote(2)
    with pytest.raises(CanaryFailed, match="This server is at fault: the champion before"):
        start(registry)


def test_a_canary_that_was_changed_or_removed_is_damage(promote: Promote, registry: Path) -> None:
    version = promote(1)
    folder = version_folder(registry, NAME, version)
    folder.chmod(0o755)
    canary = folder / CANARY_NAME
    content = canary.read_bytes()
    canary.unlink()
    assert [finding.message for finding in audit(registry, NAME).findings] == ["missing"]
    canary.write_bytes(content.replace(b'"line": 1', b'"line": 9'))
    (finding,) = audit(registry, NAME).findings
    assert finding.message.startswith("has changed")
