"""Benchmarks of sagan_layers; not part of the installed package."""
