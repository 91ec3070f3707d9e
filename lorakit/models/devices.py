"""Where a model can go on this machine."""

from __future__ import annotations

import torch

from ..errors import ConfigError, did_you_mean

_KNOWN = ("cpu", "cuda", "mps", "xpu")
_ALIASES = {
    "gpu": "cuda",
    "nvidia": "cuda",
    "rocm": "cuda",
    "hip": "cuda",
    "amd": "cuda",
    "metal": "mps",
    "apple": "mps",
}


def parse_device(name: str | torch.device) -> torch.device:
    """Return a device from its name, whether or not it is here.

    Raises:
        ConfigError: there is no device of that name anywhere.
    """
    try:
        return torch.device(name)
    except RuntimeError:
        kind, _, number = str(name).partition(":")
        alias = _ALIASES.get(kind.casefold())
        meant = alias + (f":{number}" if number.isdecimal() else "") if alias else None
        hint = f"; did you mean '{meant}'?" if meant else did_you_mean(kind.casefold(), _KNOWN)
        raise ConfigError(f"'{name}' is no device{hint} (expected {', '.join(_KNOWN)}, or cuda:1 and so on)") from None


def check_device(name: str | torch.device, setting: str = "device") -> torch.device:
    """Return a device of this machine; call it before loading anything.

    Args:
        setting: what the message calls the setting.

    Raises:
        ConfigError: there is no such device, or this machine does not have it.
    """
    try:
        device = parse_device(name)
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from None
    if device.type in ("cpu", "meta"):
        return device
    try:
        torch.empty(1, device=device)
    except (AssertionError, ImportError, NotImplementedError, RuntimeError):
        raise ConfigError(
            f"{setting} is '{name}', which torch does not find on this machine; it finds {', '.join(_here())}"
        ) from None
    return device


def _here() -> list[str]:
    """Return the names of the devices that torch finds."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return ["cpu", *cuda, *mps]
