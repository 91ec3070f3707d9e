"""Compiling parts of a decoder layer, once for all layers and all lengths."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ...errors import ConfigError


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return torch.compile's version of a function of a layer, the same one for every layer.

    The number of tokens is a variable in it. It is compiled again for an input without gradient, such as the first
    layer's, for evaluation, and for layers that differ in more than their weights.
    """
    return torch.compile(function, dynamic=True)


def check_compiler(device: torch.device) -> None:
    """Raise ConfigError if torch.compile would find no compiler for a device."""
    if device.type == "cpu":
        command = os.environ.get("CXX", "g++")
        if shutil.which(command.split()[0]) is None:
            raise ConfigError(f"compile needs a C++ compiler, but there is no '{command}'; install g++ or set CXX")
    elif importlib.util.find_spec("triton") is None:
        raise ConfigError(f"compile needs triton for a model on {device}, but it is not installed: pip install triton")
