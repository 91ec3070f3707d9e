"""Combining several adapters into one and resizing one to another rank, both computed on the true updates."""
