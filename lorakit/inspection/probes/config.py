"""`ProbeConfig`: what the probes look at, and how often."""

from __future__ import annotations

from pydantic import Field

from ...settings import Settings


class ProbeConfig(Settings):
    """How closely to look at a run while it trains.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range.
    """

    every: int = Field(1, ge=1, description="steps between looks at norms, gradients, updates and token losses")
    noise_every: int | None = Field(5, ge=1, description="steps between looks at the gradient's noise; null: never")
    spectra_every: int | None = Field(
        25, ge=1, description="steps between looks at each update's singular values; null: never"
    )
    drift_every: int | None = Field(
        50,
        ge=1,
        description="steps between passes over fixed rows, which show how far activations have drifted",
    )
    drift_rows: int = Field(4, ge=1, description="rows of that pass, from the held-out or else training records")
    drift_length: int = Field(16, ge=2, description="tokens of each of those rows")
    dead_after: int = Field(
        10,
        ge=1,
        description="steps after which a layer with B still zero, or without gradient so long, is reported",
    )
    parquet: bool = Field(False, description="write probes.parquet too, at the end; needs pyarrow")
    tensorboard: bool = Field(False, description="write TensorBoard's files too, to tensorboard/; needs tensorboard")
