"""Attention over packed documents whose tokens are spread over cp ranks."""
