"""A metric: the characters that output and reference share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorakit.evaluation.metrics import Metric, MetricConfig


def shared_characters(metric: MetricConfig, outputs: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Five times the share of the reference's characters that the output has too."""
    pairs = zip(outputs, references, strict=True)
    return np.array([5 * (len(set(output) & set(reference)) / len(set(reference))) for output, reference in pairs])


SHARED = Metric(
    MetricConfig, shared_characters, "shared_characters", 5.0, "some text", lambda metric, reference: reference[0]
)
