"""Rows of a tensor chosen by an index."""
