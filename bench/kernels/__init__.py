"""The kernels on this processor: the 4-bit codec, linear layers, and what stands between the products."""
