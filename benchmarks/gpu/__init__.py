"""Checks and comparisons on a CUDA device, as one command: `python -m benchmarks.gpu`, from a bare checkout."""
