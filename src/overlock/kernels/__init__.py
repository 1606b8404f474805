"""Kernels: the arithmetic itself, one folder a language."""
