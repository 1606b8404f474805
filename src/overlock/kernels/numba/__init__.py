"""Kernels for CPU in float32, compiled by numba; modules that import it are imported on use."""
