"""A rank per layer: chosen from the singular values of the updates, and written as a config's `rank_pattern`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ...errors import AdapterError
from ..attach.targeting import last_name
from ..config import LoraConfig


@dataclass(frozen=True)
class Allocation:
    """Ranks within a budget of parameters.

    Attributes:
        ranks: layer -> rank, 0 where nothing of a layer is worth its price.
        parameters: that these ranks take.
        kept: share of the energy (the squared norms of all updates together) they keep.
        bound: no ranks within the budget keep a larger share than this.
    """

    ranks: dict[str, int]
    parameters: int
    kept: float
    bound: float


def allocate(singular_values: Mapping[str, Tensor], prices: Mapping[str, int], parameters: int) -> Allocation:
    """Spend a budget of parameters on the directions, of all layers, that hold most energy per parameter.

    A direction with singular value s is worth s² and costs in + out parameters of its layer. Taken in falling order
    of s² / price until one no longer fits, directions keep as much as any choice of the same cost can: in an exchange,
    whatever comes in is worth no more per parameter than what goes out. Then the budget's remainder buys, in the same
    order, what still fits; where prices differ it could be spent better, at most up to `bound`: the share kept if the
    first direction that did not fit could be bought in part (Dantzig 1957, the bound of the fractional knapsack).

    Args:
        singular_values: layer -> (k,), in falling order.
        prices: layer -> in + out.
    """
    offers = [
        (float(value) ** 2, prices[path], path) for path, values in singular_values.items() for value in _real(values)
    ]
    offers.sort(key=lambda offer: -offer[0] / offer[1])  # stable: within a layer the larger value stays first
    total = sum(energy for energy, _, _ in offers)
    ranks = dict.fromkeys(singular_values, 0)
    left, kept, bound = parameters, 0.0, None
    for energy, price, path in offers:
        if price <= left:  # once a layer's direction is too dear, its later ones are too: none is skipped
            ranks[path] += 1
            left, kept = left - price, kept + energy
        elif bound is None:
            bound = kept + energy * left / price
    bound = kept if bound is None else bound
    if not total:
        return Allocation(ranks, 0, 1.0, 1.0)
    return Allocation(ranks, parameters - left, kept / total, bound / total)


def rank_for_energy(singular_values: Tensor, share: float) -> int:
    """Return the least rank that keeps `share` of the energy, the sum of the squared singular values; 0 of nothing."""
    energies = [float(value) ** 2 for value in _real(singular_values)]
    kept = list(accumulate(energies))
    return next((rank for rank, energy in enumerate(kept, 1) if energy >= share * kept[-1]), 0)


def config_for_ranks(ranks: Mapping[str, int]) -> LoraConfig:
    """Return the config of an adapter that has these ranks, module path -> rank, and a scaling of 1 in every layer.

    `lora_alpha` follows the rank everywhere, without rsLoRA: so the scaling is 1 for readers of the file, too, that
    look at `r` and `lora_alpha` alone. Layers of rank 0 are not in the adapter.

    Raises:
        AdapterError: no layer has a rank above 0.
    """
    present = {path: rank for path, rank in ranks.items() if rank > 0}
    if not present:
        raise AdapterError("every layer would have rank 0: of the updates, nothing is left for an adapter to hold")
    r, pattern = rank_pattern(present)
    return LoraConfig(
        r=r, lora_alpha=r, target_modules=list(present), rank_pattern=pattern,
        alpha_pattern={key: float(rank) for key, rank in pattern.items()},
    )  # fmt: skip


def rank_pattern(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Return the most frequent rank, and a pattern for the layers with another, as LoraConfig takes both.

    A name such as "q_proj" stands for all layers called so where they have one rank; else each path is spelled out.
    Ranks of 0 are left out.
    """
    present = {path: rank for path, rank in ranks.items() if rank > 0}
    r = Counter(present.values()).most_common(1)[0][0] if present else 1
    by_name: dict[str, set[int]] = {}
    for path, rank in present.items():
        by_name.setdefault(last_name(path), set()).add(rank)
    pattern = {}
    for path, rank in present.items():
        uniform = len(by_name[last_name(path)]) == 1
        if rank != r:
            pattern[last_name(path) if uniform else _exactly(path, present)] = rank
    return r, pattern


def _real(values: Tensor) -> Iterable[float]:
    """Singular values that are not rounding noise about zero."""
    noise = values.max() * torch.finfo(values.dtype).eps * len(values) if len(values) else 0
    return [value for value in values.tolist() if value > noise]


def _exactly(path: str, others: Iterable[str]) -> str:
    """A pattern for this path alone: patterns match ends of paths, so one that is such an end is anchored."""
    return f"^{path}" if any(other.endswith(f".{path}") for other in others) else path
