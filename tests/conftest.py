"""Fixtures for every test: the real model, imported once and cached as a user's is."""

from __future__ import annotations

import os
from pathlib import Path

# Waiting threads must sleep, not spin: on two cores, a second process makes spinning ones fifty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import settings

from lorakit.models import resolve_model

# For changes to the codec, three minutes: HYPOTHESIS_PROFILE=thorough pytest tests/quantization
settings.register_profile("default", deadline=None, max_examples=200)
settings.register_profile("thorough", deadline=None, max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The checkpoint folder of the real SmolLM2-135M-Instruct."""
    return resolve_model("smollm2-135m-instruct")
