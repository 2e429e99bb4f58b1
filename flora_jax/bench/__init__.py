"""Benchmarks: what a layer and the engine cost, with the machine and the command in every result."""
