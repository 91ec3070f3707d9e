"""Merging adapters into weights, in a model or from file to file, and undoing a merge to the bit."""
