"""Questions that need many runs or many types: the inside of an adapter, the quality of 4 bits."""
