"""Attention against its formula, with gradients by finite differences, and the key/value cache."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_alike
from torch import Tensor

from lorakit.errors import ShapeError
from lorakit.models.decoder.attention import attention
from lorakit.models.decoder.cache import KVCache


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One head at a time, keys and values repeated."""
    group = q.shape[1] // k.shape[1]
    heads = []
    for head in range(q.shape[1]):
        scores = q[:, head] @ k[:, head // group].transpose(-1, -2) / q.shape[-1] ** 0.5
        heads.append((scores + mask).softmax(dim=-1) @ v[:, head // group])
    return torch.stack(heads, dim=1)


def causal(length: int) -> Tensor:
    return torch.zeros(length, length).masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))


def tensors(heads: int, kv_heads: int, queries: int, keys: int, dim: int = 4, batch: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(batch, h, n, dim, dtype=torch.float64, requires_grad=True)
        for h, n in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    ]


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_causal_value_and_gradient(heads: int, kv_heads: int, length: int) -> None:
    q, k, v = tensors(heads, kv_heads, length, length)
    assert_alike(attention(q, k, v, None), formula(q, k, v, causal(length)), 2 * 600 + 64)
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, None), (q, k, v), fast_mode=True)


@pytest.mark.parametrize("length", [511, 512, 513])  # explicit products up to here, the fused kernel beyond
def test_both_ways_of_computing_agree(length: int) -> None:
    q, k, v = tensors(4, 2, length, length, batch=1)
    ours = attention(q, k, v, None)
    theirs = formula(q, k, v, causal(length))
    assert_alike(ours, theirs, 2 * 600 + 64)
    upstream = torch.randn_like(ours)
    for mine, expected in zip(
        torch.autograd.grad(ours, [q, k, v], upstream), torch.autograd.grad(theirs, [q, k, v], upstream), strict=True
    ):
        assert_alike(mine, expected, 2 * 600 + 64)


@pytest.mark.parametrize("keys", [5, 600])
def test_an_additive_mask_hides_what_it_says(keys: int) -> None:
    q, k, v = (t.detach() for t in tensors(4, 2, 3, keys))
    mask = torch.zeros(2, 3, keys, dtype=torch.float64)
    mask[0, :, 2:] = float("-inf")
    mask[1, 1, 0] = float("-inf")
    assert_alike(attention(q, k, v, mask[:, None]), formula(q, k, v, mask), 2 * 600 + 64)


def test_inputs_and_upstream_gradient_are_left_alone_and_backward_repeats() -> None:
    q, k, v = tensors(4, 2, 5, 5)
    y = attention(q, k, v, None)
    upstream = torch.randn_like(y)
    copies = [t.detach().clone() for t in (q, k, v, upstream)]
    first = torch.autograd.grad(y, [q, k, v], upstream, retain_graph=True)
    second = torch.autograd.grad(y, [q, k, v], upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(t, copy) for t, copy in zip((q, k, v, upstream), copies, strict=True))


def test_non_contiguous_inputs() -> None:
    q, k, v = (t.detach() for t in tensors(4, 2, 5, 5))
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert not strided[0].is_contiguous()
    assert_alike(attention(*strided, None), attention(q, k, v, None), 2 * 600 + 64)


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k, v = tensors(4, 3, 2, 2)
    with pytest.raises(ShapeError, match="4 query heads do not divide among 3 key/value heads"):
        attention(q, k, v, None)


class TestKVCache:
    def cache(self, batch: int = 3, capacity: int = 6, prefix: KVCache | None = None) -> KVCache:
        return KVCache(2, 1, 4, torch.zeros(batch, dtype=torch.int64), capacity, torch.float32, prefix=prefix)

    def test_it_returns_what_was_put_in_layer_by_layer(self) -> None:
        cache, parts = self.cache(), [torch.randn(2, 3, 1, n, 4) for n in (2, 1, 3)]
        for part in parts:
            for layer in (0, 1):
                keys, values = cache.extend(layer, part[layer], -part[layer])
            cache.length += part.shape[3]
        assert torch.equal(keys, torch.cat([part[1] for part in parts], dim=2))
        assert torch.equal(values, -keys)

    def test_a_prefix_is_kept_once(self) -> None:
        single = self.cache(batch=1, capacity=5)
        part = torch.randn(1, 1, 2, 4)
        single.extend(1, part, -part)
        single.length = 2
        cache = self.cache(prefix=single)
        assert (cache.prefix_length, cache.length) == (2, 0)
        shared = cache.shared(1)
        assert shared is not None
        assert torch.equal(shared[0], part[0])
        assert torch.equal(shared[1], -part[0])
        assert self.cache().shared(1) is None

    def test_rows_are_dropped(self) -> None:
        cache = KVCache(1, 1, 2, torch.tensor([0, 1, 2]), 4, torch.float32)
        part = torch.arange(6.0).view(3, 1, 1, 2)
        cache.extend(0, part, part)
        cache.length = 1
        cache.select(torch.tensor([0, 2]))
        assert cache.padding.tolist() == [0, 2]
        keys, _ = cache.extend(0, part[:2], part[:2])
        assert torch.equal(keys[:, :, 0], part[[0, 2], :, 0])
