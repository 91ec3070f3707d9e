"""The composition of a gain with a product and an update, in a dtype that has few digits near 1."""

import pytest
import torch

from lorakit.layers.gains import compose, gain_minus_one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_it_is_what_is_missing_to_the_gained_sum(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gain, product, update = 1 + torch.randn(5) / 8, torch.randn(3, 5).to(dtype), torch.randn(3, 5).to(dtype)
    expected = gain.double() * (product.double() + update.double()) - product.double()
    found = compose(gain, product, update)
    size = (gain.double() - 1).abs() * product.double().abs() + gain.double() * update.double().abs()
    assert (
        found.dtype == dtype and ((found.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * size + 1e-7).all()
    )


def test_a_gain_next_to_one_counts_in_bf16() -> None:
    gain = torch.tensor([1.002])
    assert gain.bfloat16() == 1 and gain_minus_one(gain, torch.bfloat16) == torch.tensor(0.002).bfloat16()
