"""Merging adapters into weights, in a model or from file to file, and undoing it to the bit."""
