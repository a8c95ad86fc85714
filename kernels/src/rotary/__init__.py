"""Rotary embedding of packed tokens."""
