"""Rows to Samples to tokens to packs to batches."""
