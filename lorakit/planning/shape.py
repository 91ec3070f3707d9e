"""The shape of a model and its adapter, read from config.json alone: every linear layer, its format and its adapter."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from ..adapters import LoraConfig
from ..checkpoints.checkpoint import Checkpoint, read_config
from ..errors import AdapterError, CheckpointError, did_you_mean
from ..files import read_json_object
from ..models.decoder.config import DecoderConfig
from ..models.decoder.decoder import Decoder
from ..models.load import decoder_config, meta_decoder, weight_formats
from ..models.pretrained import KNOWN_MODELS, resolve_model
from ..quantization.policy import QuantConfig, WeightFormat
from ..quantization.scales import NESTED_BLOCK_SIZE
from .adapter_size import AdapterSize, adapter_sizes


@dataclass(frozen=True)
class LinearShape:
    """A frozen linear layer and its adapter.

    Attributes:
        path: path of the module.
        in_features, out_features: dimensions of the weight.
        has_bias: whether the layer has a bias.
        format: the weight's quantization; None: it is not quantized.
        adapter: the size of the adapter here.
    """

    path: str
    in_features: int
    out_features: int
    has_bias: bool
    format: WeightFormat | None
    adapter: AdapterSize

    @property
    def elements(self) -> int:
        """Elements of the weight."""
        return self.in_features * self.out_features

    @property
    def is_trained(self) -> bool:
        """Whether the output has a gradient even if the input has none."""
        return bool(self.adapter.trained)

    @property
    def trains_a(self) -> bool:
        """Whether A is trained; its gradient needs x."""
        return self.adapter.trains("lora_A")

    @property
    def trains_weight(self) -> bool:
        """Whether a full copy of the weight is trained, or the weight is a tied embedding that the adapter trains."""
        return self.adapter.trains("weight") or self.adapter.follows_embedding is not None

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of the weight: codes, scales and tables of `Linear4bit`, or values of `dtype`."""
        if self.format is None:
            return self.elements * dtype.itemsize
        blocks = math.ceil(self.elements / self.format.block_size)
        codebook, packed = 16 * 4, math.ceil(self.elements / 2)
        if not self.format.double_quant:
            return codebook + packed + 4 * blocks
        dynamic_map, offset = 256 * 4, 4
        return codebook + packed + blocks + 4 * math.ceil(blocks / NESTED_BLOCK_SIZE) + offset + dynamic_map


@dataclass(frozen=True)
class LayerShape:
    """The linear layers of a decoder layer, in groups that read the same x."""

    qkv: tuple[LinearShape, ...]
    output: LinearShape
    gate_up: tuple[LinearShape, ...]
    down: LinearShape

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """All layers in the order of the forward pass."""
        return (*self.qkv, self.output, *self.gate_up, self.down)


@dataclass(frozen=True)
class ModelShape:
    """A decoder with its adapter.

    Attributes:
        config: the decoder's configuration.
        layers: the decoder layers, from first to last.
        head: the output head.
        embedding, norm: the adapter's size at the embedding and at the final norm.
        others: elements of all other parameters: embedding, norms, biases, and an untied head that is not quantized.
    """

    config: DecoderConfig
    layers: tuple[LayerShape, ...]
    head: LinearShape
    embedding: AdapterSize
    norm: AdapterSize
    others: int

    @property
    def adapter_sizes(self) -> tuple[AdapterSize, ...]:
        """The adapter's size at each module, in model order."""
        return (self.embedding, *(linear.adapter for linear in self.linears), self.norm, self.head.adapter)

    @property
    def trained(self) -> tuple[int, ...]:
        """Elements of every trained parameter."""
        return tuple(elements for size in self.adapter_sizes for elements in size.sizes)

    @property
    def adapter_parameters(self) -> int:
        """Elements of all parameters of the adapter, trained or not."""
        return sum(self.trained) + sum(size.frozen for size in self.adapter_sizes)

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """All linear layers except the head."""
        return tuple(linear for layer in self.layers for linear in layer.linears)

    @property
    def parameters(self) -> int:
        """Elements of the model without the adapter; a tied head counts once."""
        return self.others + sum(linear.elements for linear in self.linears)

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the frozen model."""
        head = self.head.nbytes(dtype) if self.head.format else 0  # an unquantized head is in `others`
        return self.others * dtype.itemsize + head + sum(linear.nbytes(dtype) for linear in self.linears)


def find_config(model: str | os.PathLike[str] | DecoderConfig | Decoder) -> DecoderConfig:
    """Return the configuration of a checkpoint folder, a config.json or a known model.

    No weight is read, except those of an output head that config.json calls tied and the folder holds all the same.

    Raises:
        CheckpointError: there is no such file, folder or known model, or the file is not a JSON object.
        ConfigError: the architecture is not supported, or a key is missing or wrong.
    """
    if isinstance(model, DecoderConfig | Decoder):
        return model if isinstance(model, DecoderConfig) else model.config
    if not isinstance(model, str | os.PathLike):
        raise CheckpointError(f"expected a checkpoint folder, a config.json or a Decoder, not a {type(model).__name__}")
    path = Path(model).expanduser()
    if path.is_file():
        return DecoderConfig.from_dict(read_json_object(path))
    if not path.is_dir() and str(model) not in KNOWN_MODELS:
        hint = did_you_mean(path.name.lower(), KNOWN_MODELS)
        raise CheckpointError(
            f"'{model}' is neither a folder, nor a config.json, nor a known model ({', '.join(KNOWN_MODELS)}){hint}"
        )
    folder = resolve_model(model)
    with contextlib.suppress(CheckpointError):  # config.json is enough for a plan
        return decoder_config(Checkpoint(folder))
    return DecoderConfig.from_dict(read_config(folder))


def model_shape(config: DecoderConfig, lora: LoraConfig, quant: QuantConfig, lora_fa: bool = False) -> ModelShape:
    """Return the shapes of a decoder with this quantization and this adapter.

    Args:
        lora_fa: whether the A of linear layers are frozen.

    Raises:
        AdapterError: a target of the adapter matches nothing, or cannot be trained.
        ConfigError: a quantization pattern matches nothing, a tied head would be quantized, or the adapter trains a
            module that cannot be planned.
    """
    model = _meta_decoder(config)
    formats = weight_formats(model, quant, list(model.state_dict()))
    sizes = adapter_sizes(model, lora, lora_fa)
    if saved := [path for path, size in sizes.items() if size.trains("weight") and formats[f"{path}.weight"]]:
        raise AdapterError(
            f"{', '.join(saved)} of modules_to_save: in 4 bits, which cannot be trained; plan for quant_type 'none'"
        )

    def shape(path: str) -> LinearShape:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        has_bias, form = linear.bias is not None, formats[f"{path}.weight"]
        return LinearShape(
            path, linear.in_features, linear.out_features, has_bias, form, sizes.get(path, AdapterSize())
        )

    def shapes(prefix: str, names: Sequence[str]) -> tuple[LinearShape, ...]:
        return tuple(shape(f"{prefix}.{name}") for name in names)

    attention, mlp = config.family.attention, config.family.mlp
    layers = tuple(
        LayerShape(
            qkv=shapes(f"{prefix}.self_attn", attention.inputs),
            output=shape(f"{prefix}.self_attn.{attention.output}"),
            gate_up=shapes(f"{prefix}.mlp", mlp.inputs),
            down=shape(f"{prefix}.mlp.{mlp.output}"),
        )
        for prefix in (f"model.layers.{index}" for index in range(config.num_hidden_layers))
    )
    head = shape("lm_head")
    counted = sum(linear.elements for layer in layers for linear in layer.linears)
    counted += head.elements if head.format else 0
    others = sum(parameter.numel() for parameter in model.parameters()) - counted
    embedding, norm = (sizes.get(path, AdapterSize()) for path in ("model.embed_tokens", "model.norm"))
    return ModelShape(config, layers, head, embedding, norm, others)


@lru_cache(maxsize=4)
def _meta_decoder(config: DecoderConfig) -> Decoder:
    """Return a decoder for all plans of a model; building it takes far longer than the rest of a plan."""
    return meta_decoder(config)
