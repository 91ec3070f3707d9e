"""PEFT's names for an adapter's files and for the tensors in them; readers and writers take them from here.

    adapter_config.json          the settings
    adapter_model.safetensors    the tensors, each named base_model.model.<path of the module>.<ending>

The endings, and the shapes behind them:

    lora_A.weight           (r, in_features)
    lora_B.weight           (out_features, r)
    lora_B.bias             (out_features,)                                     lora_bias
    lora_magnitude_vector   (out_features,), of a convolution (1, out, 1, 1)    DoRA
    lora_embedding_A, _B    (r, vocabulary), (dim, r)
    base_layer.bias         (out_features,)                                     bias of an adapted layer
    base_layer.weight       (vocabulary, dim)                                   the frozen table of an embedding
    <parameter>             as it is                                            modules_to_save, bias of other modules
    token_adapter.trainable_tokens_delta    (tokens, dim), rows, not differences

The adapter's name is in none of them. Of several adapted parameters of one module the last is at the module's path, the
one before at <path of the module>.base_layer, and so on.
"""

from __future__ import annotations

from typing import Literal

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"  # as PEFT wrote weights before safetensors; it is never read
BASE_KEY = "lorakit.base"  # in the weights' metadata: the fingerprint of the base model

PREFIX = "base_model.model."
BASE_LAYER = "base_layer"

Role = Literal["lora_A", "lora_B", "bias", "magnitude"]

# A parameter's name in the layer -> how its tensor's name ends, where the two differ.
_ENDINGS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_bias": "lora_B.bias",
    "trained_bias": f"{BASE_LAYER}.bias",
    "trainable_tokens_delta": "token_adapter.trainable_tokens_delta",
}
# How the name of a low-rank layer's tensor ends -> what the tensor is to the layer.
_ROLES: dict[str, Role] = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",  # as PEFT before 0.11 wrote it
}


def tensor_name(path: str, parameter: str) -> str:
    """Return the name of a module's tensor in the file.

    Args:
        path: of the module, "" for the model itself.
        parameter: its name in our layer, such as "lora_A" or "lora_magnitude_vector".
    """
    ending = _ENDINGS.get(parameter, parameter)
    return f"{PREFIX}{path}.{ending}"


def matrix_names(path: str, is_embedding: bool) -> tuple[str, str]:
    """Return the names of a layer's A and B in the file."""
    a, b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    return tensor_name(path, a), tensor_name(path, b)


def path_and_role(name: str) -> tuple[str, Role] | None:
    """Return the module's path and the role of a low-rank layer's tensor; None where the name is of another kind."""
    for ending, role in _ROLES.items():
        if name.startswith(PREFIX) and name.endswith(f".{ending}"):
            return name[len(PREFIX) : -len(ending) - 1], role
    return None
