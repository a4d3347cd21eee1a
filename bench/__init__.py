"""Benchmarks; each is run by `python -m bench.<name>`."""
