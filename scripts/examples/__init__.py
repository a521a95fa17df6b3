"""Example programs: own environments, networks and loops with the library."""
