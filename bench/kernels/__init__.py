"""The kernels on this processor: the 4-bit codec, linear layers, and the operations between the products."""
