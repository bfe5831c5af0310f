"""The Triton backend: kernels and their launches. They take plainly shaped tensors and import nothing of
`qaconv_triton` but `common` and `progress`."""
