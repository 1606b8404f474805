"""Kernels for CUDA; modules here import triton, so they are imported on use."""
