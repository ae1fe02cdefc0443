"""Which tier a parameter belongs to, by depth, importance or pattern, and when a tier is due."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_core import ConfigError, DamagedError, TierMap, assign_tiers
from nested_core.config.sections import Assignment, NestedSection
from nested_core.optim.tier_assignment import count_expected_updates, refuse_tiers_never_due
from nested_core.optim.tiers_file import read_tiers, write_tiers

PARTS = ("self_attn.q_proj.lora_a", "self_attn.q_proj.lora_b", "mlp.up_proj.lora_a")


def names_of(layers: list[int]) -> list[str]:
    """The LoRA leaves of these layers, the last layer first."""
    return [f"model.layers.{layer}.{part}" for layer in reversed(layers) for part in PARTS]


def section(tiers: int, **settings: Any) -> NestedSection:
    """Settings for this many tiers, of frequencies 1, 2, 4, ..."""
    return NestedSection(frequencies=tuple(2**i for i in range(tiers)), **settings)


def manual(tiers: int, *rules: tuple[str, int]) -> NestedSection:
    """Settings with these patterns."""
    assignments = tuple(Assignment(match=match, tier=tier) for match, tier in rules)
    return section(tiers, strategy="manual", assignments=assignments)


def layers_by_tier(tiers: TierMap) -> list[list[int]]:
    """The layers of each tier, ascending; a layer that is split would be in two."""
    return [
        sorted({int(name.split(".")[2]) for name in tiers.names(tier)})
        for tier in range(len(tiers.frequencies))
    ]


class TestLayerDepth:
    def test_shallow_layers_are_fastest_by_default(self) -> None:
        tiers = assign_tiers(names_of(list(range(12))), section(3))
        assert layers_by_tier(tiers) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
        assert tiers.frequencies == (1, 2, 4)

    def test_deep_layers_are_fastest_when_asked(self) -> None:
        tiers = assign_tiers(names_of(list(range(12))), section(3, fast="deep"))
        assert layers_by_tier(tiers) == [[8, 9, 10, 11], [4, 5, 6, 7], [0, 1, 2, 3]]

    @given(
        count=st.integers(1, 40),
        tiers=st.integers(1, 8),
        first=st.integers(0, 90),
        stride=st.integers(1, 3),
        fast=st.sampled_from(["shallow", "deep"]),
    )
    def test_groups_are_contiguous_near_equal_and_of_whole_layers(
        self, count: int, tiers: int, first: int, stride: int, fast: Literal["shallow", "deep"]
    ) -> None:
        layers = list(range(first, first + count * stride, stride))
        settings = section(min(tiers, count), fast=fast)
        names = names_of(layers)
        tier_map = assign_tiers(names, settings)
        groups = layers_by_tier(tier_map)
        ordered = groups if fast == "shallow" else groups[::-1]
        assert [layer for group in ordered for layer in group] == layers
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
        assert tier_map.tensors.keys() == set(names)

    def test_too_few_layers_are_refused(self) -> None:
        with pytest.raises(
            ConfigError, match=r"^3 tiers need at least 3 layers .* there are 2\. Raise num_"
        ):
            assign_tiers(names_of([4, 5]), section(3))

    def test_parameters_outside_the_layers_go_to_the_slowest_with_a_warning(self) -> None:
        names = [*names_of([0, 1]), "model.embed_tokens.lora_a", "lm_head.lora_b"]
        with pytest.warns(UserWarning, match="have no tier") as caught:
            tiers = assign_tiers(names, section(2))
        assert "tier 1: lm_head.lora_b, model.embed_tokens.lora_a" in str(caught[0].message)
        assert tiers.tensors["lm_head.lora_b"] == tiers.tensors["model.embed_tokens.lora_a"] == 1

    def test_a_warning_names_at_most_eight(self) -> None:
        orphans = [f"head.{i}.w" for i in range(9)]
        with pytest.warns(UserWarning, match=r"^9 trainable .* head\.7\.w \.\.\.$"):
            assign_tiers([*names_of([0, 1]), *orphans], section(2))

    def test_one_tier_needs_no_layer(self) -> None:
        names = ["model.embed_tokens.lora_a", "model.embed_tokens.lora_b"]
        assert assign_tiers(names, section(1)).tensors == dict.fromkeys(names, 0)
        with pytest.raises(ConfigError, match="2 tiers need at least 2 layers"):
            assign_tiers(names, section(2))

    def test_with_one_tier_nothing_is_warned_of(self) -> None:
        tiers = assign_tiers([*names_of([0]), "lm_head.lora_a"], section(1))
        assert set(tiers.tensors.values()) == {0}


class TestImportance:
    def test_the_most_important_layers_are_fastest(self) -> None:
        names = names_of([0, 1, 2, 3])
        weights = {0: 0.1, 1: 5.0, 2: 0.2, 3: 3.0}
        importance = {name: weights[int(name.split(".")[2])] for name in names}
        tiers = assign_tiers(names, section(2, strategy="parameter_importance"), importance)
        assert layers_by_tier(tiers) == [[1, 3], [0, 2]]

    def test_a_layer_counts_with_all_its_parameters(self) -> None:
        names = ["layers.0.a", "layers.0.b", "layers.1.a"]
        importance = {"layers.0.a": 1.0, "layers.0.b": 1.0, "layers.1.a": 1.5}
        tiers = assign_tiers(names, section(2, strategy="parameter_importance"), importance)
        assert tiers.tensors == {"layers.0.a": 0, "layers.0.b": 0, "layers.1.a": 1}

    def test_of_equally_important_layers_the_shallow_are_fastest(self) -> None:
        names = names_of([3, 4, 5, 6])
        importance = dict.fromkeys(names, 1.0)
        tiers = assign_tiers(names, section(4, strategy="parameter_importance"), importance)
        assert layers_by_tier(tiers) == [[3], [4], [5], [6]]


class TestManual:
    def test_the_first_pattern_that_matches_decides(self) -> None:
        rules = manual(3, (r"q_proj\.lora_b$", 2), ("q_proj", 0), (r"^model\.", 1))
        tiers = assign_tiers(names_of([0]), rules)
        assert tiers.tensors == {
            "model.layers.0.mlp.up_proj.lora_a": 1,
            "model.layers.0.self_attn.q_proj.lora_a": 0,
            "model.layers.0.self_attn.q_proj.lora_b": 2,
        }

    def test_a_pattern_that_matches_nothing_is_refused(self) -> None:
        with pytest.raises(
            ConfigError, match=r"'v_proj' matched no trainable parameter\. .*up_pro"
        ):
            assign_tiers(names_of([0]), manual(2, ("q_proj", 0), (r"v_proj", 1)))

    @pytest.mark.slow("a pattern is searched for until it is ended")
    def test_a_pattern_that_takes_for_ever_is_refused(self) -> None:
        with pytest.raises(
            ConfigError,
            match=r"in 3 parameter names was ended: it took more than 5 seconds of processor time",
        ):
            assign_tiers(names_of([0]), manual(2, (r"^(([a-z0-9_.])+)+$!", 0), (".", 1)))

    def test_a_tier_without_parameters_is_refused(self) -> None:
        rules = manual(3, ("q_proj", 0), (".", 2))
        with pytest.raises(ConfigError, match=r"^Tier 1 of 3 would hold no parameter\."):
            assign_tiers(names_of([0, 1]), rules)

    def test_what_no_pattern_takes_goes_to_the_slowest_with_a_warning(self) -> None:
        with pytest.warns(UserWarning, match=r"go to the slowest, tier 1: .*up_proj\.lora_a$"):
            tiers = assign_tiers(names_of([0]), manual(2, ("q_proj", 0)))
        assert tiers.tensors["model.layers.0.mlp.up_proj.lora_a"] == 1


class TestTierMap:
    def test_names_are_in_natural_order(self) -> None:
        tiers = assign_tiers(["layers.10.w", "layers.2.w", "layers.1.w"], section(1))
        assert list(tiers.tensors) == ["layers.1.w", "layers.2.w", "layers.10.w"]

    def test_tiers_json_has_the_parameters_by_name_and_is_read_back(self, tmp_path) -> None:
        tiers = assign_tiers(["layers.10.w", "layers.2.w"], section(2))
        write_tiers(tmp_path / "tiers.json", tiers)
        written = json.loads((tmp_path / "tiers.json").read_bytes())
        assert written == {"frequencies": [1, 2], "tensors": {"layers.10.w": 1, "layers.2.w": 0}}
        assert list(written["tensors"]) == ["layers.10.w", "layers.2.w"]
        assert read_tiers(tmp_path / "tiers.json") == tiers

    @pytest.mark.parametrize(
        ("changed", "problem"),
        [
            ({"frequencies": [0, 2]}, "a frequency below 1"),
            ({"tensors": {"a": 2}}, "a tier that has no frequency"),
            ({"tensors": {"a": -1}}, "a tier that has no frequency"),
            ({"tensors": {"a": 1.0}}, "tensors.a"),
        ],
    )
    def test_no_other_tiers_json_is_read(self, tmp_path, changed, problem) -> None:
        written = {"frequencies": [1, 2], "tensors": {"a": 0}} | changed
        (tmp_path / "tiers.json").write_text(json.dumps(written))
        with pytest.raises(DamagedError, match=problem):
            read_tiers(tmp_path / "tiers.json")

    def test_a_tier_is_due_at_multiples_of_its_frequency(self) -> None:
        tiers = TierMap((1, 2, 3), {})
        assert [tiers.due(step) for step in (1, 2, 3, 6)] == [(0,), (0, 1), (0, 2), (0, 1, 2)]


def test_a_tier_that_is_never_due_is_refused() -> None:
    refuse_tiers_never_due((1, 8), 8)
    with pytest.raises(ConfigError, match=r"^Tier 1 updates every 8 .* only 7 "):
        refuse_tiers_never_due((1, 8), 7)


@given(steps=st.integers(0, 300), frequency=st.integers(1, 40), flushed=st.booleans())
def test_expected_updates_count_the_due_steps_and_one_for_a_flushed_chunk(
    steps: int, frequency: int, flushed: bool
) -> None:
    due = [n for n in range(1, steps + 1) if n % frequency == 0]
    open_chunk = steps > (due[-1] if due else 0)
    expected = len(due) + (1 if flushed and open_chunk else 0)
    assert count_expected_updates(steps, frequency, [steps] if flushed else []) == expected
