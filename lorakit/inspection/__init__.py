"""Inspection: what an adapter did, read from its matrices."""
