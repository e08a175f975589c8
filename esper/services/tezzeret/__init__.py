"""Tezzeret compiles blueprints into kernels and validates them, each in a process of its own."""
