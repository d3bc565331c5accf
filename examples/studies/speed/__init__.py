"""The parts of `examples/studies/benchmark.py`."""
