"""Grids of runs: environments, algorithms and seeds in; finished run folders out.

Plans, a pool of processes, and their common progress.
May import: acktr.runs, acktr.config, acktr.policies, acktr.envs, acktr.files, acktr.interrupts.
"""

__all__ = ["comparison", "engines", "entries", "grid", "pool"]
