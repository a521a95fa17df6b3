"""Blocks: the curvature of one layer or parameter each, how it is inverted, and when."""
