"""Padded batches to packed documents and back."""
