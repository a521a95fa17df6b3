"""Benchmark: throughput, where the time goes, and how far from the limit that is."""
