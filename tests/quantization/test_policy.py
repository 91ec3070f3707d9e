"""Which layers are quantized: patterns match as LoRA's do, the first rule counts, and none is without effect."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.errors import ConfigError
from lorakit.quantization.policy import Override, QuantConfig, WeightFormat

NAMES = ["q_proj", "k_proj", "o_proj"]
PATHS = [f"model.layers.{i}.self_attn.{name}" for i in range(12) for name in NAMES]
PATHS += [f"model.layers.{i}.mlp.{name}" for i in range(12) for name in ("gate_up_proj", "up_proj", "down_proj")]
PATHS.append("lm_head")
NF4 = WeightFormat("nf4", 64, True)


def dense(config: QuantConfig) -> list[str]:
    return [path for path, form in config.assign(PATHS).items() if form is None]


def test_by_default_all_but_the_head() -> None:
    formats = QuantConfig().assign(PATHS)
    assert list(formats) == PATHS
    assert formats.pop("lm_head") is None
    assert set(formats.values()) == {NF4}


def test_a_model_need_not_have_a_head() -> None:
    assert QuantConfig().assign(PATHS[:-1]) == dict.fromkeys(PATHS[:-1], NF4)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("up_proj", 12),  # whole names: not gate_up_proj
        ("mlp.up_proj", 12),
        ("layers.1.mlp.up_proj", 1),  # not layers.11
        ("model.layers.3.self_attn.q_proj", 1),
        (r"layers\.\d\.mlp\..*", 30),
        (r"layers\.(0|11)\.self_attn\.[qk]_proj", 4),
        ("q_proj|k_proj", 24),
        (".*", 73),
    ],
)
def test_patterns(pattern: str, count: int) -> None:
    assert len(dense(QuantConfig(skip=(pattern,)))) == count
    formats = QuantConfig(skip=(), overrides={pattern: Override(block_size=128)}).assign(PATHS)
    assert sum(form == WeightFormat("nf4", 128, True) for form in formats.values()) == count


def test_overrides_change_what_they_say_and_keep_the_rest() -> None:
    config = QuantConfig(
        quant_type="fp4",
        block_size=256,
        double_quant=False,
        overrides={
            "q_proj": {"quant_type": "nf4"},
            "k_proj": {"block_size": 32},
            "o_proj": {"double_quant": True},
            r"layers\.0\..*": {"skip": True},
        },
    )
    formats = config.assign(PATHS)
    assert formats["model.layers.5.self_attn.q_proj"] == WeightFormat("nf4", 256, False)
    assert formats["model.layers.5.self_attn.k_proj"] == WeightFormat("fp4", 32, False)
    assert formats["model.layers.5.self_attn.o_proj"] == WeightFormat("fp4", 256, True)
    assert formats["model.layers.5.mlp.up_proj"] == WeightFormat("fp4", 256, False)
    # The first that matches counts.
    assert formats["model.layers.0.self_attn.q_proj"] == WeightFormat("nf4", 256, False)
    assert formats["model.layers.0.mlp.up_proj"] is None


def test_a_given_skip_replaces_the_default_and_overrides_do_not_change_it() -> None:
    config = QuantConfig(skip=("o_proj",), overrides={"self_attn.*": {"block_size": 32}})
    assert len(dense(config)) == 12
    assert config.assign(PATHS)["lm_head"] == NF4


def test_only_what_overrides_name() -> None:
    config = QuantConfig(quant_type=None, overrides={"q_proj": {"quant_type": "nf4"}, "k_proj": {"block_size": 32}})
    formats = config.assign(PATHS)
    assert {path for path, form in formats.items() if form} == {path for path in PATHS if path.endswith("q_proj")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip": ["up_porj"]}, "skip: no linear layer matches 'up_porj'; did you mean 'up_proj'?"),
        ({"skip": ["lm_head", "mlp.dwn_proj"]}, "did you mean 'mlp.down_proj'?"),
        ({"overrides": {"head": {"block_size": 32}}}, "overrides: no linear layer matches 'head'; did you mean"),
        ({"overrides": {"lm_head": {"block_size": 32}}}, "overrides: 'lm_head' changes nothing"),
        ({"overrides": {"mlp.*": {"block_size": 32}, "up_proj": {"block_size": 64}}}, "'up_proj' changes nothing"),
    ],
)  # fmt: skip
def test_a_pattern_without_effect_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantConfig(**settings).assign(PATHS)
    assert message in str(caught.value)


def test_all_such_patterns_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        QuantConfig(skip=("a", "b"), overrides={"c": {"block_size": 32}}).assign(PATHS)
    assert [key for key, _ in caught.value.problems] == ["skip", "skip", "overrides"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_type": "nf5"}, "unknown quant_type 'nf5'; did you mean 'nf4'?"),
        ({"block_size": 48}, "block_size 48 is not one of 32, 64"),
        ({"storage_dtype": "int8"}, "storage_dtype: input should be 'uint8'"),
        ({"skip": "lm_head"}, "skip: input should be a valid tuple"),
        ({"skip": ["("]}, "skip: '(' is not a regular expression: missing ), unterminated subpattern at position 0"),
        ({"overrides": {"[": {}}}, "overrides: '[' is not a regular expression"),
        ({"overrides": {"a": {"block_size": 3}}}, "overrides.a.block_size: block_size 3 is not one of"),
        ({"overrides": {"a": {"quant_tpye": "nf4"}}}, "overrides.a.quant_tpye: unknown key; did you mean 'quant_"),
        ({"overrides": {"a": {"skip": True, "block_size": 32}}}, "either has skip: true or says how"),
    ],
)  # fmt: skip
def test_settings_are_checked_where_they_are_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantConfig(**settings)
    assert message in str(caught.value)
