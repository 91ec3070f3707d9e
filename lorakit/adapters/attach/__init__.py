"""Attaching adapters to a model: where they go, which are active, which are trained, which wait in host memory."""
