"""Kernels: arrays in, arrays out. Imports nothing of m2jax but its own folder."""
