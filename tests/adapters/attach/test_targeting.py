"""Which layers a config reaches: names, regular expressions, exclusions, layer numbers, as PEFT reads them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import small_decoder
from torch import nn

from lorakit import LoraConfig, add_adapter
from lorakit.adapters.attach.targeting import linear_layers, match_modules, pattern_value
from lorakit.errors import AdapterError

MODEL = small_decoder()
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def matched(model: nn.Module = MODEL, **values: Any) -> list[str]:
    return [path for paths in match_modules(model, LoraConfig(**values)).values() for path in paths]


def paths(*names: str, layers: tuple[int, ...] = (0, 1)) -> list[str]:
    return [f"model.layers.{i}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}" for i in layers for name in names]


@pytest.mark.parametrize("targets", ["all-linear", "All-Linear"])
def test_all_linear_is_every_layer_but_the_head(targets: str) -> None:
    assert matched(target_modules=targets) == paths(*ATTENTION, *MLP)
    assert "lm_head" in linear_layers(MODEL)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"target_modules": ["q_proj"]}, paths("q_proj")),
        ({"target_modules": ["lm_head"]}, ["lm_head"]),
        ({"target_modules": ["self_attn.q_proj"]}, paths("q_proj")),
        ({"target_modules": ["model.layers.1.mlp.up_proj"]}, paths("up_proj", layers=(1,))),
        ({"target_modules": r".*\.[qv]_proj"}, paths("q_proj", "v_proj")),
        ({"target_modules": r"model\.layers\.0\.mlp\..*"}, paths(*MLP, layers=(0,))),
        ({"exclude_modules": ["down_proj", "o_proj"]}, paths("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")),
        ({"exclude_modules": r".*\.mlp\..*"}, paths(*ATTENTION)),
        ({"exclude_modules": []}, paths(*ATTENTION, *MLP)),
        ({"layers_to_transform": [1]}, paths(*ATTENTION, *MLP, layers=(1,))),
        ({"layers_to_transform": 0, "target_modules": ["q_proj"]}, paths("q_proj", layers=(0,))),
        ({"layers_to_transform": [], "target_modules": ["q_proj"]}, paths("q_proj")),
    ],
)
def test_what_matches(values: dict[str, Any], expected: list[str]) -> None:
    assert matched(**values) == expected


@pytest.mark.parametrize(
    "name", ["_proj", "proj", "q_pro", "attn.q_proj", "Q_PROJ", ".*", "layers", "norm", "self_attn"]
)
def test_a_name_in_a_list_is_a_whole_component_of_a_linear_layer(name: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(f"no module matches '{name}'")):
        matched(target_modules=[name])


@pytest.mark.parametrize("expression", ["q_proj", "layers", r"model\.layers\.\d"])
def test_a_regular_expression_spans_the_whole_path(expression: str) -> None:
    with pytest.raises(AdapterError, match="no module matches"):
        matched(target_modules=expression)


def test_every_pattern_has_to_match_and_what_they_share_is_adapted_once() -> None:
    found = match_modules(MODEL, LoraConfig(target_modules=["q_proj", "self_attn.q_proj"]))
    assert found == {"q_proj": paths("q_proj"), "self_attn.q_proj": paths("q_proj")}
    model = small_decoder()
    assert add_adapter(model, LoraConfig(target_modules=["q_proj", "self_attn.q_proj"])).modules == paths("q_proj")


def test_an_adapted_model_matches_like_a_plain_one() -> None:
    model = small_decoder()
    add_adapter(model, LoraConfig(target_modules=["lm_head", "q_proj"]))
    assert linear_layers(model).keys() == linear_layers(MODEL).keys()
    assert matched(model) == matched(MODEL)  # the head is left out although it is wrapped
    assert not any(path.endswith(("base_layer", "lora_A")) for path in linear_layers(model))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({}, 8),
        ({"q_proj": 1}, 1),
        ({"self_attn.q_proj": 1}, 1),
        ({"proj": 1}, 8),
        ({".*proj": 1}, 1),
        ({r"layers\.0\..*": 1}, 8),
        ({r"layers\.1\..*": 1}, 1),
        ({"^model.layers.1.self_attn.q_proj": 1}, 1),
        ({"^layers": 1}, 8),
        ({"k_proj": 1, "q_proj": 2, ".*": 3}, 2),
        ({"k_proj|q_proj": 4}, 4),
    ],
)
def test_patterns_are_read_as_peft_reads_them(patterns: dict[str, int], expected: int) -> None:
    path = "model.layers.1.self_attn.q_proj"
    assert pattern_value(patterns, path, 8) == expected


@given(st.lists(st.sampled_from([*ATTENTION, *MLP, "lm_head"]), unique=True, min_size=1), st.sets(st.integers(0, 1)))
@settings(max_examples=40, deadline=None)
def test_a_list_is_the_same_as_the_regular_expression_for_it(names: list[str], layers: set[int]) -> None:
    values: dict[str, Any] = {"layers_to_transform": sorted(layers)} if layers and names != ["lm_head"] else {}
    if values:
        names = [name for name in names if name != "lm_head"]
    by_list = matched(target_modules=names, **values)
    by_expression = matched(target_modules=rf"(.*\.)?({'|'.join(names)})", **values)
    assert sorted(by_list) == sorted(by_expression)
