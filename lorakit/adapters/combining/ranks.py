"""Ranks of single layers: how to choose them from the updates' singular values, and how `rank_pattern` spells them."""

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
        ranks: layer -> rank, 0 if no direction of the layer is worth its price.
        parameters: number of parameters that these ranks take.
        kept: share of the energy (the sum of the squared norms of all updates) that they keep.
        bound: upper bound of that share for all ranks within the budget.
    """

    ranks: dict[str, int]
    parameters: int
    kept: float
    bound: float


def allocate(singular_values: Mapping[str, Tensor], prices: Mapping[str, int], parameters: int) -> Allocation:
    """Spend a budget of parameters on the directions, in all layers, that hold the most energy per parameter.

    A direction with singular value s is worth s² and costs in + out parameters of its layer. Directions are taken in
    falling order of s² / price. Until one no longer fits, they keep as much as any choice of the same cost: an exchange
    would bring in a direction worth no more per parameter than the one it replaces. The rest of the budget buys, in the
    same order, the directions that still fit. If prices differ, the rest could be spent better, at most up to `bound`:
    the share kept if a fraction of the first direction that did not fit could be bought (Dantzig 1957, the bound of the
    fractional knapsack).

    Args:
        singular_values: layer -> (k,), in falling order.
        prices: layer -> in + out.
    """
    offers = [
        (float(value) ** 2, prices[path], path)
        for path, values in singular_values.items()
        for value in _above_noise(values)
    ]
    offers.sort(key=lambda offer: -offer[0] / offer[1])  # stable: within a layer the larger value stays first
    total = sum(energy for energy, _, _ in offers)
    ranks = dict.fromkeys(singular_values, 0)
    left, kept, bound = parameters, 0.0, None
    for energy, price, path in offers:
        if price <= left:  # if a layer's direction is too dear, so are its later ones: ranks never skip a direction
            ranks[path] += 1
            left, kept = left - price, kept + energy
        elif bound is None:
            bound = kept + energy * left / price
    bound = kept if bound is None else bound
    if not total:
        return Allocation(ranks, 0, 1.0, 1.0)
    return Allocation(ranks, parameters - left, kept / total, bound / total)


def rank_for_energy(singular_values: Tensor, share: float) -> int:
    """Return the least rank that keeps `share` of the energy, the sum of the squared singular values (k,).

    It is 0 if all of them are zero.
    """
    energies = [float(value) ** 2 for value in _above_noise(singular_values)]
    kept = list(accumulate(energies))
    return next((rank for rank, energy in enumerate(kept, 1) if energy >= share * kept[-1]), 0)


def config_for_ranks(ranks: Mapping[str, int]) -> LoraConfig:
    """Return the config of an adapter that has these ranks, module path -> rank, and a scaling of 1 in every layer.

    `lora_alpha` equals the rank everywhere, without rsLoRA, so the scaling is 1 even for readers of the file that look
    only at `r` and `lora_alpha`. Layers of rank 0 are left out.

    Raises:
        AdapterError: no layer has a rank above 0.
    """
    present = {path: rank for path, rank in ranks.items() if rank > 0}
    if not present:
        raise AdapterError("every layer would have rank 0: nothing is left for an adapter to hold")
    r, pattern = rank_pattern(present)
    return LoraConfig(
        r=r, lora_alpha=r, target_modules=list(present), rank_pattern=pattern,
        alpha_pattern={key: float(rank) for key, rank in pattern.items()},
    )  # fmt: skip


def rank_pattern(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Return `r`, the most frequent rank, and `rank_pattern`, for the layers with another rank.

    A last name such as "q_proj" stands for all layers of that name if they have one rank; otherwise each path is
    spelled out. Ranks of 0 are left out.
    """
    present = {path: rank for path, rank in ranks.items() if rank > 0}
    r = Counter(present.values()).most_common(1)[0][0] if present else 1
    by_name: dict[str, set[int]] = {}
    for path, rank in present.items():
        by_name.setdefault(last_name(path), set()).add(rank)
    pattern = {}
    for path, rank in present.items():
        is_uniform = len(by_name[last_name(path)]) == 1
        if rank != r:
            pattern[last_name(path) if is_uniform else _exactly(path, present)] = rank
    return r, pattern


def _above_noise(values: Tensor) -> Iterable[float]:
    """Return the singular values, (k,), that are more than rounding noise around zero."""
    noise = values.max() * torch.finfo(values.dtype).eps * len(values) if len(values) else 0
    return [value for value in values.tolist() if value > noise]


def _exactly(path: str, others: Iterable[str]) -> str:
    """Return a pattern for this path alone: patterns match the ends of paths, so it is anchored if others end in it."""
    return f"^{path}" if any(other.endswith(f".{path}") for other in others) else path
