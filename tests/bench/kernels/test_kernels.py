"""The calls that the measurements time, at small shapes: they run, and compute what they say."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from bench.harness import peers
from bench.kernels import decode, dequantize, linear4bit, quantize

SHAPE = (64, 256)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """torchao is not compiled here, which takes seconds."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("module", [dequantize, quantize, decode, linear4bit])
def test_contenders(module: ModuleType) -> None:
    calls = module.calls(SHAPE, *([3] if len(module.SIZES[0]) > 1 else []))
    missing = {name for name in ("bitsandbytes", "torchao") if not peers.has(name)}
    assert list(calls) == [name for name in module.CONTENDERS if name not in missing]
    for call in calls.values():
        call()


def test_dequantizing_fills_the_buffer_with_what_is_fresh_elsewhere() -> None:
    calls = dequantize.calls(SHAPE)
    calls["copy"]()
    reused = calls["reused buffer"]()
    assert isinstance(reused, torch.Tensor) and reused is calls["reused buffer"]()
    fresh = calls["fresh"]()
    assert isinstance(fresh, torch.Tensor) and torch.equal(reused, fresh) and fresh is not calls["fresh"]()


def test_the_limit_of_one_token_reads_as_many_bytes_as_the_codes_have() -> None:
    codes = decode.calls(SHAPE, 1)["read the codes"].__self__  # type: ignore[attr-defined]
    assert codes.nbytes == SHAPE[0] * SHAPE[1] // 2


def test_layers_multiply_by_the_same_weight() -> None:
    x = torch.randn(5, SHAPE[1]).bfloat16()
    results = {name: layer(x) for name, layer in linear4bit.layers(SHAPE, training=True).items()}
    for name, y in results.items():
        error = (y - results["dense"]).float().norm() / results["dense"].float().norm()
        assert error < 0.15, name  # that of four bits
