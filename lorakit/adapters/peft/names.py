"""PEFT's names for an adapter's files and their tensors, for all readers and writers.

    adapter_config.json          the settings
    adapter_model.safetensors    the tensors, each named base_model.model.<path of the module>.<ending>

The endings, and the shapes behind them:

    lora_A.weight           (r, in_features)
    lora_B.weight           (out_features, r)
    lora_embedding_A, _B    (r, vocabulary), (dim, r)
    base_layer.bias         (out_features,)                                     bias of an adapted layer
    base_layer.weight       (vocabulary, dim)                                   the frozen table of an embedding
    <parameter>             unchanged                                           modules_to_save, bias of other modules
    token_adapter.trainable_tokens_delta    (tokens, dim), rows, not differences

A variant (`lorakit.layers.variants`) names its own trained tensors. No name contains the adapter's name. If a module
has several adapted parameters, the last is at the module's path, the one before at <path of the module>.base_layer, and
so on.
"""

from __future__ import annotations

from ...layers import VARIANTS, LoRAEmbedding, LoRALinear, Variant
from ..attach.wrappers import plain_name

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"  # PEFT's weights before safetensors; never read
BASE_SAMPLE_KEY = "lorakit.base_weights"  # in the weights' metadata: samples of the base model's weights
START_KEY = "lorakit.start"  # there too: the start of an adapter that holds what quantization took from the base
BASE_KEY = "lorakit.base"  # the same in older files: a hash of the base model's vectors

PREFIX = "base_model.model."
BASE_LAYER = "base_layer"

# A parameter's name in the module -> the end of its tensor's name, where they differ in every variant.
_ENDINGS = {
    "trained_bias": f"{BASE_LAYER}.bias",
    "trainable_tokens_delta": "token_adapter.trainable_tokens_delta",
}


def canonical_name(name: str) -> str:
    """Return a name in a file in its usual form: with the prefix, which some programs omit, and without wrappers'."""
    name = plain_name(name)
    return name if name.startswith(PREFIX) else f"{PREFIX}{name}"


def tensor_name(path: str, parameter: str, variant: Variant = VARIANTS["plain"]) -> str:
    """Return the name of a module's tensor in the file.

    Args:
        path: of the module, "" for the model itself.
        parameter: its name in lorakit's layer, such as "lora_A" or "lora_magnitude_vector".
        variant: of the adapter.
    """
    ending = variant.endings.get(parameter) or _ENDINGS.get(parameter, parameter)
    return f"{PREFIX}{path}.{plain_name(ending)}"


def matrix_names(path: str, is_embedding: bool) -> tuple[str, str]:
    """Return the names of a plain layer's A and B in the file."""
    a, b = (LoRAEmbedding if is_embedding else LoRALinear).matrices
    return tensor_name(path, a), tensor_name(path, b)


def path_and_table(name: str, variant: Variant) -> tuple[str, str] | None:
    """Return the path and the table of a low-rank layer's tensor; None for any other name.

    Args:
        name: of the tensor in the file.
        variant: of the adapter. Tensors that only other variants train are recognized too, for an error message.
    """
    tables = {variant.endings.get(table, table): table for table in (*LoRALinear.matrices, *LoRAEmbedding.matrices)}
    for one in VARIANTS.values():
        tables |= {one.endings.get(table, table): table for table in one.trained} | dict(one.old_endings)
    for ending, table in tables.items():
        if name.startswith(PREFIX) and name.endswith(f".{ending}"):
            return name[len(PREFIX) : -len(ending) - 1], table
    return None
