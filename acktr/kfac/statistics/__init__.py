"""Statistics: what layers saw in a recorded pass, and running averages of the factors."""
