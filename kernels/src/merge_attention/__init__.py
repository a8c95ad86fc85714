"""Attention over two sets of keys from attention over each."""
