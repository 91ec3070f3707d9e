"""Probes: measurements inside an adapter while it trains."""

from .config import ProbeConfig
from .drift import linear_cka, relative_drift
from .log import ProbeLog, read_probes
from .noise import NoiseEstimate, estimate_noise, noise_scale
from .probes import Probes

__all__ = [
    "NoiseEstimate",
    "ProbeConfig",
    "ProbeLog",
    "Probes",
    "estimate_noise",
    "linear_cka",
    "noise_scale",
    "read_probes",
    "relative_drift",
]
