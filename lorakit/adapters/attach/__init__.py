"""Attaching adapters to a model: where they go, which are active, which are trained, and where they wait."""
