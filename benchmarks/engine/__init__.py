"""Benchmarks of the engine: each remedy by itself, peers on the same texts, latency under load.

`make bench-engine`, or `python -m benchmarks.engine --help`.
"""
