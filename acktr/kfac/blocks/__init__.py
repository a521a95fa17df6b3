"""Blocks: the curvature of one layer or parameter each, how it is inverted, and when.

The ``registry`` gives every parameter a block. In come the uses of its layers, which a layout
(``linear``, ``layouts``, ``projections``, ``rules``, ``tied``) takes for rows of a linear map, and
gradients; out go directions.
"""
