"""`plan`: predict the memory and operations of a training run from config.json, before anything is allocated."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from ..adapters import LoraConfig
from ..errors import ConfigError
from ..models.decoder.config import DecoderConfig
from ..models.decoder.decoder import Decoder
from ..quantization.policy import QuantConfig
from ..training import TrainConfig
from .result import Cost, Plan, limit_bytes
from .runtime import CPU_RUNTIME, GPU_RUNTIME, measure_flops
from .setting import Setting
from .shape import find_config
from .suggestions import suggestions


def plan(
    model: str | os.PathLike[str] | DecoderConfig | Decoder,
    lora: LoraConfig | None = None,
    train: TrainConfig | None = None,
    *,
    quant_type: str | None = "nf4",
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 64,
    double_quant: bool = True,
    sequence_length: int | None = None,
    device: str = "cpu",
    memory: int | str | None = None,
    dataset_tokens: int | None = None,
    price_per_hour: float | None = None,
    flops_per_second: float | None = None,
    runtime_bytes: int | None = None,
) -> Plan:
    """Predict the peak memory, by part, and the FLOPs of training; of the model, only config.json is read.

    One exception: a head that config.json calls tied and the folder holds all the same is compared with the embedding.
    The plan assumes that every sequence is as long as the longest and that every token is trained. A run with shorter
    sequences needs less.

    Args:
        model: a checkpoint folder, a config.json, a known model's name, a decoder or its configuration.
        lora, train: settings; default: those of a run without settings.
        quant_type, dtype, block_size, double_quant: as for `load_model`.
        sequence_length: tokens of the longest sequence; default: train.max_length, or the model's context if shorter.
        device: "cpu" predicts the process's resident memory, "cuda" the memory used on a GPU.
        memory: a limit, in bytes or as text such as "24GB"; a plan that exceeds it has suggestions.
        dataset_tokens: tokens of the training data for one of train.epochs passes; gives the plan a cost.
        price_per_hour: price of the machine, in any currency.
        flops_per_second: speed of the machine; default: this CPU's matrix products are timed.
        runtime_bytes: memory of a process without a model; default: a constant, which `measure_runtime` measures anew.

    Raises:
        CheckpointError: there is no such model, or no config.json in its folder.
        ConfigError: the architecture is not supported, a key or a setting is missing or wrong, a sequence exceeds the
            context, the adapter has a part that cannot be planned, or nothing fits the limit (the message names the
            least that can be reached).
        AdapterError: `add_adapter` would raise it, for example because a target matches nothing.
    """
    config = find_config(model)
    train = train or TrainConfig()
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device '{device}' cannot be planned for (known: cpu, cuda)")
    if train.offload_activations and device == "cpu":
        raise ConfigError("offload_activations relieves a GPU and is an error on the CPU; plan for device 'cuda'")
    length = sequence_length or min(train.max_length, config.context_length)
    if not 2 <= length <= config.context_length:
        raise ConfigError(f"sequence_length {length} must be from 2 to the model's context of {config.context_length}")
    quant = QuantConfig(quant_type=quant_type, block_size=block_size, double_quant=double_quant)
    if runtime_bytes is None:
        runtime_bytes = CPU_RUNTIME if device == "cpu" else GPU_RUNTIME
    setting = Setting(
        config=config,
        lora=lora or LoraConfig(),
        train=train,
        quant=quant,
        dtype=dtype,
        length=length,
        device=device,
        runtime_bytes=runtime_bytes,
    )
    result = setting.plan()
    if memory is not None:
        limit = limit_bytes(memory)
        result = replace(result, memory=limit, suggestions=suggestions(setting, result, limit))
    if dataset_tokens is not None:
        rate = flops_per_second or _measured_rate(device, dtype)
        result = replace(result, cost=_cost(result, round(dataset_tokens * train.epochs), rate, price_per_hour))
    elif price_per_hour is not None:
        raise ConfigError("price_per_hour is the price of training on a data set; give dataset_tokens too")
    return result


def _measured_rate(device: str, dtype: torch.dtype) -> float:
    if device != "cpu":
        raise ConfigError("give flops_per_second: the rate of a GPU cannot be measured here")
    return measure_flops(dtype)


def _cost(result: Plan, tokens: int, rate: float, price_per_hour: float | None) -> Cost:
    flops = result.flops.total / result.step_tokens * tokens
    seconds = flops / rate
    return Cost(tokens, flops, rate, seconds, None if price_per_hour is None else seconds / 3600 * price_per_hour)
