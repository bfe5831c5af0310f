"""The CPU backend: the functions of the modules of the same names in kernels/, in plain torch."""
