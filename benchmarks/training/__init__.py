"""Does training still work with lossy levers? `python -m benchmarks.training`."""
