"""The Triton kernels: on a GPU, and as compiled code where there is none."""
