"""Every lever alone, and all of them together: `python -m benchmarks.frontier`."""
