"""Online 3D bin packing: environments, players without learning, and networks.

Importing this package registers PackingHeightmap-v0 and PackingLeaves-v0 with Gymnasium.
"""

import gymnasium

from scripts.examples.packing.environments import HeightmapPacking, LeafPacking

__all__ = ["HeightmapPacking", "LeafPacking"]

gymnasium.register("PackingHeightmap-v0", "scripts.examples.packing.environments:HeightmapPacking")
gymnasium.register("PackingLeaves-v0", "scripts.examples.packing.environments:LeafPacking")
