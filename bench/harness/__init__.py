"""Shared parts of all measurements: timing, processes, reports, pictures, peers, checkpoints with random weights."""
