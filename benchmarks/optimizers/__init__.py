"""How well does each optimizer train, at a rate of its own? `python -m benchmarks.optimizers`."""
