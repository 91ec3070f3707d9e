"""Long sums against float64, with summands of one sign, whose plain fp32 sums are visibly wrong."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_within, rounding

from lorakit.sums import LONGEST_SUM, SLICE, flat_slices, norms, product


def one_after_the_other(products: torch.Tensor) -> float:
    """Return the fp32 sum as the plainest BLAS adds it; `cumsum` adds in this order, in the dtype it is given."""
    return float(products.numpy().cumsum()[-1])


def test_one_fp32_accumulator_loses_digits_where_slices_keep_them() -> None:
    a, b = torch.rand(1, 1 << 23), torch.rand(1 << 23, 1)
    exact = a.double() @ b.double()
    bound = rounding(SLICE + a.numel() // SLICE, exact)  # the terms of a slice, then the slices
    assert abs(one_after_the_other(a[0] * b[:, 0]) - exact.item()) > bound.item()
    assert_within(product(a, b), exact, bound)


@pytest.mark.parametrize("terms", [LONGEST_SUM, LONGEST_SUM + 1, 3 * LONGEST_SUM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_slices_are_added_without_another_dtypes_rounding(terms: int, dtype: torch.dtype) -> None:
    a, b = torch.rand(2, terms).to(dtype), torch.rand(terms, 3).to(dtype)
    exact = a.double() @ b.double()
    found = product(a, b)
    assert found.dtype == dtype
    accumulator = torch.promote_types(dtype, torch.float32)
    longest = terms if terms <= LONGEST_SUM else SLICE + -(-terms // SLICE)
    # Each slice's product is rounded to the dtype, and so is the result.
    assert_within(found, exact, rounding(longest, exact, accumulator) + rounding(2, exact, dtype))


def test_what_fits_one_slice_is_the_plain_product() -> None:
    a, b = torch.randn(3, 1000), torch.randn(1000, 5)
    assert torch.equal(product(a, b), a @ b)


@pytest.mark.parametrize("shape", [(), (0,), (5, 7), (LONGEST_SUM + 1,), (4096, 4097)], ids=str)
def test_norms_of_few_and_of_many_elements(shape: tuple[int, ...]) -> None:
    tensor = 1 + torch.rand(shape)
    (found,) = norms([tensor])
    exact = tensor.double().norm()
    # n roundings of a sum of squares are n / 2 of its root, which takes two roots and a sum of slices more.
    terms = min(tensor.numel(), LONGEST_SUM) + len(flat_slices(tensor)) + 4
    assert_within(torch.tensor(found), exact, rounding(terms, exact) / 2)
    assert sum(len(one) for one in flat_slices(tensor)) == tensor.numel()


def test_no_norms() -> None:
    assert norms([]) == []
