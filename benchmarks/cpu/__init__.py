"""The parts of benchmarks/recompute_cpu.py."""
