"""Losses: what a network's outputs mean; targets drawn from them, and their Fisher."""
