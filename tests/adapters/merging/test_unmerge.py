"""Unmerging gives back every byte and object; what is refused changes nothing; the report is readable."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import DTYPES, X, adapt, full_snapshot, mlp, small_decoder
from tolerances import assert_alike
from torch import nn

from lorakit import (
    LoraConfig,
    adapter_parameters,
    add_adapter,
    merge_adapter,
    remove_adapter,
    set_adapter,
    unmerge_adapter,
)
from lorakit.adapters import lora_layers
from lorakit.errors import AdapterError

# Roundings through `made.mlp`: sums over 64 inputs, 4 ranks, 48 hidden and 4 ranks;
# the merged weights have three more, DoRA's norm as many as it has inputs.
TERMS = 64 + 4 + 48 + 4 + 2 * 3


class TestUnmerging:
    @settings(max_examples=50)
    @given(data=st.data())
    @pytest.mark.filterwarnings("ignore:in . of . layers")  # an update of 0.1% is below the steps of 16-bit weights
    def test_gives_back_every_byte_and_object(self, data: st.DataObject) -> None:
        dtype, four_bit = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
        model = mlp(four_bit, dtype)
        names = data.draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3, unique=True))
        for name in names:
            target = data.draw(st.sampled_from([["0"], ["2"], ["0", "2"]]))
            size = data.draw(st.sampled_from([1e-3, 0.1, 3.0]))
            adapt(model, name, size, target_modules=target, use_dora=data.draw(st.booleans()))
        set_adapter(model, data.draw(st.lists(st.sampled_from(names), unique=True)))
        before = full_snapshot(model)
        order = data.draw(st.permutations(names))
        count = data.draw(st.integers(1, len(order)))
        try:
            for name in order[:count]:
                merge_adapter(model, name, quantize=data.draw(st.booleans()))
        except AdapterError as error:
            assert "scales the rows" in str(error)
        if hasattr(model, "lora_merged"):
            model.train(data.draw(st.booleans()))(X.to(dtype))
            unmerge_adapter(model)
        assert full_snapshot(model) == before

    def test_training_goes_on_with_the_same_parameters(self) -> None:
        model = mlp()
        adapt(model)
        parameters = adapter_parameters(model)
        merge_adapter(model)
        assert adapter_parameters(model) == []
        unmerge_adapter(model)
        assert all(a is b for a, b in zip(adapter_parameters(model), parameters, strict=True))
        model(X).sum().backward()
        assert all(parameter.grad is not None for parameter in parameters)

    def test_an_adapter_that_came_since_stays(self) -> None:
        model = mlp(four_bit=True)
        adapt(model, "a")
        merge_adapter(model, "a")
        adapt(model, "b")
        set_adapter(model, "b")
        unmerge_adapter(model)
        reference = mlp(four_bit=True)
        adapt(reference, "a")
        for path, layer in lora_layers(model).items():
            assert set(layer.lora_A) == {"a", "b"}
            plain = lora_layers(reference)[path]
            assert torch.equal(layer.base_weight(torch.float32), plain.base_weight(torch.float32))
        set_adapter(model, "a")
        assert torch.equal(model(X), reference(X))

    def test_a_model_that_was_converted_since(self) -> None:
        model = mlp(four_bit=True)
        adapt(model)
        codes = model[0].base_layer.packed.clone()
        merge_adapter(model)
        model.bfloat16()
        unmerge_adapter(model)
        assert model[2].base_layer.weight.dtype == torch.bfloat16
        assert torch.equal(model[0].base_layer.packed, codes)
        assert model(X.bfloat16()).dtype == torch.bfloat16

    def test_a_copy_has_its_own_originals(self) -> None:
        model = mlp()
        adapt(model)
        before = model(X)
        merge_adapter(model)
        twin = copy.deepcopy(model)
        unmerge_adapter(twin)
        assert torch.equal(twin(X), before) and not lora_layers(model)
        unmerge_adapter(model)
        assert torch.equal(model(X), before)

    def test_not_reversible(self) -> None:
        model = mlp()
        adapt(model, "a")
        expected = model(X)
        merge_adapter(model, "a", reversible=False)
        with pytest.raises(AdapterError, match="nothing is merged"):
            unmerge_adapter(model)
        adapt(model, "b")
        merge_adapter(model, "b")
        unmerge_adapter(model)
        set_adapter(model, [])
        assert_alike(model(X), expected, TERMS)


class TestRefusals:
    def refused(self, model: nn.Module, call: Callable[[nn.Module], object]) -> str:
        before = full_snapshot(model)
        with pytest.raises(AdapterError) as caught:
            call(model)
        assert full_snapshot(model) == before
        return str(caught.value)

    def test_unknown_ones_with_the_nearest(self) -> None:
        model = mlp()
        adapt(model, "french")
        message = self.refused(model, lambda m: merge_adapter(m, "frensh"))
        assert "no adapter 'frensh'; did you mean 'french'" in message
        assert "nothing to merge" in self.refused(model, lambda m: merge_adapter(m, []))
        assert "nothing is merged" in self.refused(model, unmerge_adapter)

    def test_merging_twice(self) -> None:
        model = mlp()
        adapt(model)
        merge_adapter(model)
        assert "'default' is merged already" in self.refused(model, merge_adapter)

    def test_a_name_that_was_given_to_another_since(self) -> None:
        model = mlp()
        adapt(model)
        merge_adapter(model)
        adapt(model)
        for call in (unmerge_adapter, merge_adapter):
            assert "new adapter with the name of a merged one, 'default'" in self.refused(model, call)
        remove_adapter(model)
        unmerge_adapter(model)

    def test_a_layer_that_was_replaced_since(self) -> None:
        model = mlp()
        adapt(model)
        merge_adapter(model)
        model[2] = nn.Linear(48, 32)
        assert "2 is no longer the layer that was merged" in self.refused(model, unmerge_adapter)

    @pytest.mark.parametrize("four_bit", [False, True])
    def test_overflow(self, four_bit: bool) -> None:
        model = mlp(four_bit, torch.float16)
        adapt(model, "a")
        adapt(model, "b")
        merge_adapter(model, "a")
        lora_layers(model)["2"].lora_B["b"].data *= 1e9
        before = full_snapshot(model)
        with pytest.raises(AdapterError, match="2: the merged weight would hold inf or nan in float16"):
            merge_adapter(model, "b")
        assert full_snapshot(model) == before  # "a" is merged as it was
        unmerge_adapter(model)
        assert list(lora_layers(model)["0"].lora_A) == ["b", "a"]

    def test_one_that_would_change_another_adapters_meaning(self) -> None:
        model = mlp()
        adapt(model, "a")
        adapt(model, "rows", use_dora=True)
        assert "'rows' scales the rows" in self.refused(model, lambda m: merge_adapter(m, "a"))
        merge_adapter(model, ["a", "rows"])

    def test_a_residual_of_a_merge_for_good(self) -> None:
        model = mlp(four_bit=True)
        adapt(model)
        merge_adapter(model, quantize=True, reversible=False)
        adapt(model, "b")
        expected = model(X)
        assert "quantize=False only" in self.refused(model, lambda m: merge_adapter(m, "b", quantize=True))
        merge_adapter(model, "b")
        assert_alike(model(X), expected, TERMS)


class TestReport:
    def test_it_is_a_readable_table(self) -> None:
        model = mlp(four_bit=True)
        adapt(model, size=0.25)
        text = str(merge_adapter(model))
        assert text.startswith("merged 'default' into 2 layers, onto the model's own weights: 1.0000 of the update")
        first, second = text.splitlines()[-2:]
        assert first.split()[:4] == ["0", "dequantized", "+", "update"] and "25.00%" in first and "6,144" in second
        assert first.index("dequantized") == second.index("weight +") and len(first) == len(second)

    def test_the_worst_of_many_layers_are_shown(self) -> None:
        model = small_decoder(num_hidden_layers=4)
        adapt(model)
        report = merge_adapter(model)
        assert len(report.layers) == 28 and "the 20 layers in which least survived" in str(report)
        assert len(report.table().splitlines()) == 29

    def test_a_warning_where_much_is_lost(self) -> None:
        model = mlp(dtype=torch.bfloat16)
        adapt(model, size=1e-4)  # less than bf16 can add
        for layer in lora_layers(model).values():
            layer.lora_A["default"].data = layer.lora_A["default"].data.sign() * 1e-4
            layer.lora_B["default"].data = layer.lora_B["default"].data.sign() * 1e-4
        with pytest.warns(UserWarning, match=r"in 2 of 2 layers less than 0.95 of the update survived"):
            report = merge_adapter(model)
        assert report.share < 0.95 and str(report).count("warning: ") == 2

    def test_an_untrained_adapter(self) -> None:
        model = mlp()
        add_adapter(model, LoraConfig(r=2))
        report = merge_adapter(model)
        assert report.share == 1 and not report.warnings and report.layers[0].norm == 0


def test_no_parameter_is_left_behind_in_the_state() -> None:
    model = mlp()
    names = list(model.state_dict())
    adapt(model)
    merge_adapter(model)
    assert list(model.state_dict()) == names


def test_inference_mode_leaves_ordinary_tensors() -> None:
    model = mlp()
    adapt(model)
    with torch.inference_mode():
        merge_adapter(model)
    adapt(model, "b")
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(model))
