"""Exact and approximate Fisher matrices of a small classifier, side by side."""
