"""Torch and JAX in one process, on the same memory: tensors (`dlpack`), pools, weights and metadata (`share`), and our
backends called from jitted JAX code (`jax`). Importing this package imports neither framework."""
