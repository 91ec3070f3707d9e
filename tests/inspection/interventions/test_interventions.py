"""Interventions do what they say, as dense matrices show, and leave every byte of the model as it was; studies find
what was planted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import conversations, small_decoder, small_tokenizer
from tolerances import SMALL_DECODER, assert_alike, rounding
from torch import Tensor, nn

from lorakit import Decoder, LoraConfig, Tokenizer, add_adapter, disable_adapters, set_adapter
from lorakit.adapters import lora_layers
from lorakit.data import encode_records
from lorakit.errors import AdapterError, LorakitError
from lorakit.inspection.interventions.interventions import ablated, scaled, swapped, truncated, without_directions
from lorakit.inspection.interventions.studies import (
    causal_map,
    direction_map,
    held_out_loss,
    rank_curve,
    scale_sweep,
    swap_map,
)
from lorakit.training import mean_loss

IDS = torch.randint(400, (2, 12), generator=torch.Generator().manual_seed(0))
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
RANK = 4


def adapted(**lora: Any) -> Decoder:
    """A model with a random adapter "default", active, and another one, "other", on fewer layers."""
    model = small_decoder()
    torch.manual_seed(0)
    add_adapter(model, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "k_proj"]), name="other")
    add_adapter(model, LoraConfig(**{"r": RANK, "lora_alpha": 12, "init_lora_weights": False, **lora}))
    return model


def state(model: nn.Module) -> list[Any]:
    """Everything that an intervention might leave changed."""
    found: list[Any] = [[(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()]]
    found += [[p.detach().view(-1).view(torch.uint8).tolist() for p in model.parameters()]]
    found += [[(name, module.training) for name, module in model.named_modules()]]
    found += [[(dict(layer.scaling), layer.active) for layer in lora_layers(model).values()]]
    return found


# Of a mean of squared logits, in which a rounding counts twice.
OF_METRIC = 2 * float(rounding(SMALL_DECODER, 1.0))


def of_factors_in_fp32(s: Tensor) -> Tensor:
    """How far an update may be whose two factors, the roots of these values, are rounded to fp32."""
    return rounding(3, s.sum())


def logits(model: nn.Module) -> float:
    """A metric that every weight has a part in."""
    return float(model(IDS).detach().double().square().mean())


def delta(model: nn.Module, path: str, name: str = "default") -> Tensor:
    layer = lora_layers(model)[path]
    return layer.scaling[name] * layer.lora_B[name].detach().double() @ layer.lora_A[name].detach().double()


CONTEXTS: dict[str, Callable[[nn.Module], AbstractContextManager[nn.Module]]] = {
    "ablated": lambda model: ablated(model, [Q, V]),
    "swapped": lambda model: swapped(model, [Q, V], "default", "other"),
    "scaled": lambda model: scaled(model, 0.1),
    "truncated": lambda model: truncated(model, 1),
    "truncated to nothing": lambda model: truncated(model, 0),
    "without directions": lambda model: without_directions(model, Q, [0, 2]),
}
STUDIES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "causal_map": lambda model, metric: causal_map(model, metric, "kind"),
    "direction_map": lambda model, metric: direction_map(model, metric, [Q]),
    "swap_map": lambda model, metric: swap_map(model, metric, "default", "other", "block"),
    "scale_sweep": lambda model, metric: scale_sweep(model, metric, [0, 2]),
    "rank_curve": lambda model, metric: rank_curve(model, metric),
}


class TestTheModelIsLeftAsItWas:
    @pytest.mark.parametrize("use_dora", [False, True])
    @pytest.mark.parametrize("context", CONTEXTS)
    def test_by_contexts(self, context: str, use_dora: bool) -> None:
        model = adapted(use_dora=use_dora)
        before, value = state(model), logits(model)
        with CONTEXTS[context](model) as same:
            assert same is model
            assert logits(model) != value
        assert state(model) == before and logits(model) == value
        with pytest.raises(ZeroDivisionError), CONTEXTS[context](model):
            _ = 1 / 0
        assert state(model) == before

    def test_by_contexts_within_contexts(self) -> None:
        model = adapted()
        before = state(model)
        with truncated(model, 2), scaled(model, 0.5), ablated(model, [V]), without_directions(model, Q, [0]):
            assert len(lora_layers(model)[Q].lora_A["default"]) == 2
        assert state(model) == before

    @pytest.mark.parametrize("study", STUDIES)
    def test_by_studies_and_failing_metrics(self, study: str) -> None:
        model = adapted()
        before, calls = state(model), iter(range(100))
        STUDIES[study](model, logits)
        assert state(model) == before

        def fails(model: nn.Module) -> float:
            if next(calls) == 1:
                raise ZeroDivisionError
            return logits(model)

        with pytest.raises(ZeroDivisionError):
            STUDIES[study](model, fails)
        assert state(model) == before


class TestContexts:
    @given(rank=st.integers(0, RANK), path=st.sampled_from([Q, V]))
    @settings(max_examples=10, deadline=None)
    def test_truncated_is_the_truncated_svd(self, rank: int, path: str) -> None:
        model = adapted()
        u, s, vh = torch.linalg.svd(delta(model, path))
        with truncated(model, rank):
            expected = u[:, :rank] * s[:rank] @ vh[:rank]
            assert (delta(model, path) - expected).norm() <= of_factors_in_fp32(s)
            assert logits(model) == pytest.approx(by_hand(model), rel=OF_METRIC)

    @given(directions=st.sets(st.integers(0, RANK - 1)))
    @settings(max_examples=10, deadline=None)
    def test_directions_are_those_of_the_svd(self, directions: set[int]) -> None:
        model = adapted()
        u, s, vh = torch.linalg.svd(delta(model, Q), full_matrices=False)
        kept = torch.tensor([0.0 if i in directions else 1.0 for i in range(len(s))], dtype=torch.float64)
        with without_directions(model, Q, directions):
            assert (delta(model, Q) - u * (s * kept) @ vh).norm() <= of_factors_in_fp32(s)

    def test_a_factor_scales_the_update(self) -> None:
        model = adapted()
        before = delta(model, Q)
        with scaled(model, 0.5, [Q]):
            assert torch.equal(delta(model, Q), 0.5 * before)
        with scaled(model, 0), disable_adapters(model):
            off = logits(model)
        with scaled(model, 0):
            assert logits(model) == off

    def test_a_factor_scales_doras_update_within_its_gain(self) -> None:
        model = adapted(use_dora=True)
        layer, x = lora_layers(model)[Q], torch.randn(5, 32)
        with torch.no_grad():
            layer(x)  # from here on the gain is kept, for this scaling
            with scaled(model, 3.0, [Q]):
                norms = (layer.base_layer.weight.double() + delta(model, Q)).norm(dim=1, keepdim=True)
                magnitude = layer.table("lora_magnitude_vector")["default"].double()[:, None]
                weight = magnitude / norms * (layer.base_layer.weight.double() + delta(model, Q))
                assert_alike(layer(x), (x.double() @ weight.T).float(), terms=2 * 32 + 12)  # the sum, DoRA's norm

    def test_a_metric_may_switch_adapters(self) -> None:
        """What a metric does within a context does not undo the intervention."""
        model = adapted()
        before, value = state(model), logits(model)
        with ablated(model, [Q]):
            without = logits(model)
            with disable_adapters(model):
                assert lora_layers(model)[V].active == ()
            assert logits(model) == without != value
        assert state(model) == before and logits(model) == value

    def test_ablating_everything_is_the_base(self) -> None:
        model = adapted()
        with disable_adapters(model):
            base = logits(model)
        with ablated(model, lora_layers(model, "default")):
            assert logits(model) == base

    def test_swapping_everything_is_the_other_adapter(self) -> None:
        model = adapted()
        set_adapter(model, "other")
        other = logits(model)
        set_adapter(model, "default")
        with swapped(model, lora_layers(model, "default"), "default", "other"):
            assert logits(model) == other
            assert lora_layers(model)[V].active == ()  # where "other" has nothing

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda model: ablated(model, ["model.layers.0.self_attn.q_porj"]), "did you mean '.*q_proj'"),
            (lambda model: ablated(model, [Q], "oter"), "did you mean 'other'"),
            (lambda model: ablated(model, [Q], "other"), "not active"),
            (lambda model: without_directions(model, Q, [4]), r"directions 0 to 3, got \[4\]"),
            (lambda model: truncated(model, -1), "0 or more"),
        ],
    )
    def test_refusals(self, call: Callable[[nn.Module], Any], message: str) -> None:
        model = adapted()
        before = state(model)
        with pytest.raises(AdapterError, match=message), call(model):
            raise AssertionError("it was not refused")
        assert state(model) == before

    def test_with_two_active_adapters_one_is_named(self) -> None:
        model = adapted()
        set_adapter(model, ["default", "other"])
        with pytest.raises(AdapterError, match="2 adapters are active"), ablated(model, [Q]):
            pass
        with ablated(model, [Q], "default"):
            assert lora_layers(model)[Q].active == ("other",)


def by_hand(model: nn.Module) -> float:
    """The metric of a model whose updates are added to the weights."""
    dense = small_decoder()
    for path in lora_layers(model, "default"):
        dense.get_submodule(path).weight.data += delta(model, path).float()
    return logits(dense)


class TestStudies:
    @pytest.fixture
    def planted(self) -> Decoder:
        """All updates are tiny but that of one layer, of rank 2, of which the first direction is nearly all."""
        model = adapted()
        for path, layer in lora_layers(model, "default").items():
            layer.lora_B["default"].data *= 20 if path == V else 1e-4
        layer = lora_layers(model)[V]
        layer.lora_B["default"].data[:, 2:] = 0
        layer.lora_B["default"].data[:, 1] *= 1e-4
        return model

    def test_the_layer_that_carries_everything_is_found(self, planted: Decoder) -> None:
        for by, expected in (("module", V), ("kind", "v_proj"), ("block", "model.layers.1")):
            found = causal_map(planted, logits, by)  # type: ignore[arg-type]
            first, second, *_ = found.ranked()
            assert first.what == expected and V in first.layers
            assert first.share == pytest.approx(1.0, abs=1e-3)
            assert abs(second.change) < 1e-2 * abs(first.change)
            alone = causal_map(planted, logits, by, keep=True)  # type: ignore[arg-type]
            enough = min(alone.effects, key=lambda effect: abs(effect.change))
            assert enough.what == expected

    def test_effects_are_those_of_metrics_taken_by_hand(self) -> None:
        model = adapted()
        found = causal_map(model, logits)
        assert found.whole == logits(model)
        assert [effect.what for effect in found.effects] == list(lora_layers(model, "default"))
        for effect in (found.effects[0], found.effects[-1]):
            with ablated(model, effect.layers):
                value = logits(model)
            assert effect.value == value and effect.change == value - found.whole
            assert effect.share == (value - found.whole) / (found.other - found.whole)
        assert len(causal_map(model, logits, "kind").effects) == 7
        assert len(causal_map(model, logits, "block").effects) == 2
        with pytest.raises(AdapterError, match="did you mean 'kind'"):
            causal_map(model, logits, "knd")  # type: ignore[arg-type]

    def test_the_direction_that_is_all(self, planted: Decoder) -> None:
        first, *others = direction_map(planted, logits, [V]).ranked()
        assert first.what == f"{V}[0]" and len(others) == 3
        assert max(abs(effect.change) for effect in others) < 1e-2 * abs(first.change)

    def test_the_rank_that_is_enough(self, planted: Decoder) -> None:
        curve = dict(rank_curve(planted, logits).points)
        assert list(curve) == [0, 1, 2, 4]
        assert curve[4] == logits(planted)
        assert curve[1] == pytest.approx(curve[4], rel=1e-3)
        with disable_adapters(planted):
            assert curve[0] == logits(planted)

    def test_a_sweep_passes_through_what_is_known(self) -> None:
        model = adapted()
        sweep = scale_sweep(model, logits)
        assert [x for x, _ in sweep.points] == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
        curve = dict(sweep.points)
        assert curve[1] == logits(model)
        for layer in lora_layers(model, "default").values():
            layer.scaling["default"] *= 2
        assert curve[2] == logits(model)
        assert sweep.table()[0] == {"factor": 0.0, "value": curve[0]}

    def test_the_layer_whose_swap_changes_everything(self, planted: Decoder) -> None:
        found = swap_map(planted, logits, "default", "other")
        assert found.ranked()[0].what == V
        assert len(found.effects) == 14

    def test_held_out_loss(self, tmp_path: Path) -> None:
        tok: Tokenizer = small_tokenizer(tmp_path)
        model, records = adapted(lora_dropout=0.3), conversations(4)
        model.train()
        before = state(model)
        metric = held_out_loss(tok, records)
        found = causal_map(model, metric, "kind")
        assert found.whole == mean_loss(model, encode_records(tok, records, 1024), 2048)
        assert state(model) == before and model.training

    def test_tables(self) -> None:
        import pandas

        found = causal_map(adapted(), logits, "kind")
        table = found.table()
        assert table[0].keys() == {"what", "layers", "value", "change", "share"} and table[0]["layers"] == 2
        assert found.to_pandas().equals(pandas.DataFrame(table))

    def test_a_package_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import sys

        monkeypatch.setitem(sys.modules, "polars", None)
        with pytest.raises(LorakitError, match="pip install polars"):
            rank_curve(adapted(), logits, [1]).to_polars()
