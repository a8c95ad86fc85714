"""Rank arithmetic, process groups and sequence sharding."""
