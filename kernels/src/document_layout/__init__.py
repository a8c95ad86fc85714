"""Offsets, positions and loss weights of packed documents, from their lengths."""
