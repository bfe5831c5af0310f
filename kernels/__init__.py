"""Triton kernels and their launchers. They take plainly shaped tensors and import nothing of `qaconv_triton`."""
