"""Benchmarks and studies around the library; README.md lists them."""
