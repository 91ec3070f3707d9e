"""The Triton kernels: on a GPU, and as compiled code without one."""
