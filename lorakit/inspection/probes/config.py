"""`ProbeConfig`: what the probes measure, and how often."""

from __future__ import annotations

from pydantic import Field

from ...settings import Settings


class ProbeConfig(Settings):
    """What the probes measure while a run trains, and how often.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range.
    """

    every: int = Field(1, ge=1, description="steps between measurements of norms, gradients, updates and token losses")
    noise_every: int | None = Field(5, ge=1, description="steps between measurements of gradient noise; null: never")
    spectra_every: int | None = Field(
        25, ge=1, description="steps between measurements of each update's singular values; null: never"
    )
    drift_every: int | None = Field(
        50,
        ge=1,
        description="steps between passes over fixed rows that measure the drift of activations; null: never",
    )
    drift_rows: int = Field(4, ge=1, description="rows of that pass, from held-out records if there are any")
    drift_length: int = Field(16, ge=2, description="most tokens of each of those rows")
    dead_after: int = Field(
        10,
        ge=1,
        description="steps after which a layer is reported if B is still zero or no gradient has arrived for so long",
    )
    parquet: bool = Field(False, description="also write probes.parquet at the end; needs pyarrow")
    tensorboard: bool = Field(False, description="also write TensorBoard files to tensorboard/; needs tensorboard")
