"""Blocks: the curvature of one layer or parameter each, and how it is inverted."""
