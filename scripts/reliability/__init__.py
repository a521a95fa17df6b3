"""Faults on purpose: what the tests and the nightly tier of reliability make go wrong."""
