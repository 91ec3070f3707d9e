"""Shared by all exports: the adapter to write, the refusals, and scales folded into B."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import AdapterError, listing
from ...layers import variants_read
from ..peft.folder import AdapterLayer
from ..peft.names import BASE_LAYER

# Settings of adapter_config.json that mean more than A and B of existing layers. The consumers here support none of
# them: they refuse some and drop the others silently.
_MORE_THAN_MATRICES = {
    "modules_to_save": "modules trained and saved in full",
    "trainable_token_indices": "trained rows of the embedding",
    "bias": "trained biases of the base's layers",
    "target_parameters": "updates of parameters that are not the weight of a layer",
    "alora_invocation_tokens": "an update that begins at certain tokens",
    "layer_replication": "layers that the base does not have",
}


@dataclass(frozen=True)
class Export:
    """An adapter to write for a consumer.

    Attributes:
        config: the contents of adapter_config.json.
        layers: module path -> A, B and scaling.
        extras: names of the file's other tensors.
        base: returns the contents of the base model's config.json, or raises CheckpointError.
        dtype: of the written tensors; None leaves the choice to `folded`.
    """

    config: Mapping[str, Any]
    layers: Mapping[str, AdapterLayer]
    extras: tuple[str, ...]
    base: Callable[[], Mapping[str, Any]]
    dtype: torch.dtype | None


def check_ranks(ranks: Mapping[str, int], max_rank: int | None) -> None:
    """Raise AdapterError if the highest rank is over the limit; the error names its layer."""
    path = max(ranks, key=lambda path: ranks[path])
    if max_rank is not None and ranks[path] > max_rank:
        raise AdapterError(
            f"{path} has rank {ranks[path]}, over the limit of {max_rank}: raise the limit (vLLM is started with "
            f"--max-lora-rank {ranks[path]}) or lower the adapter's rank"
        )


def check_plain(export: Export, consumer: str, *problems: str) -> None:
    """Refuse an adapter with anything besides A and B of linear layers and embeddings, or with other problems.

    Args:
        problems: further reasons of the consumer's own.

    Raises:
        AdapterError: there is a reason to refuse it; the message lists all of them and the alternative.
    """
    settings = {key for key, value in export.config.items() if value and value != "none"}
    variants = [one for one in variants_read(export.config) if one.trained or not one.is_low_rank]
    reasons = [f"{variant.setting}: {variant.meaning}" for variant in variants]
    reasons += [f"{key}: {meaning}" for key, meaning in _MORE_THAN_MATRICES.items() if key in settings]
    reasons += [
        f"{path}: an adapter on a layer of kind '{layer.kind}'"
        for path, layer in export.layers.items()
        if layer.kind not in ("linear", "embedding")
    ]
    # PEFT saves a copy of the base's embedding beside an adapter on it.
    copies = {f"{path}.{BASE_LAYER}.weight" for path, layer in export.layers.items() if layer.kind == "embedding"}
    if not reasons:  # otherwise a setting above explains these tensors
        reasons += [f"{name}: a tensor that is not of an adapter" for name in export.extras if name not in copies]
    if reasons := [*reasons, *problems]:
        raise AdapterError(
            f"{consumer} cannot serve this adapter as it is:{listing(reasons)}\n"
            "merge the adapter into its base model and serve that instead"
        )


def folded(export: Export, factors: Mapping[str, float]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return path -> (A, factor * B), of shapes (r, in) and (out, r); each product is rounded once.

    They have `export.dtype`. If that is None, they have the adapter's dtype, or float32 if the adapter's would round
    the products.
    """
    products = {path: factors[path] * layer.lora_B.double() for path, layer in export.layers.items()}
    dtypes = {layer.lora_B.dtype for layer in export.layers.values()}
    exact = dtypes.pop() if len(dtypes) == 1 else torch.float32
    if exact != torch.float32 and not all(torch.equal(b.to(exact).double(), b) for b in products.values()):
        exact = torch.float32
    dtype = export.dtype or exact
    return {path: (layer.lora_A.to(dtype), products[path].to(dtype)) for path, layer in export.layers.items()}
