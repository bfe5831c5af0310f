"""The Triton backend: kernels and their launches. They take plainly shaped tensors and import `common` only."""
