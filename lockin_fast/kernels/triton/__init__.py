"""Triton kernels, one file per op: the kernel, the sizes it is launched with, and its launch."""
