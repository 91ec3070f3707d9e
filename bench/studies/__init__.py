"""Questions that take many runs or many types to answer: inside an adapter, the quality of 4 bits."""
