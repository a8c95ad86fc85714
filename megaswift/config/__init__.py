"""Typed settings, one section a file, and every rule between fields."""
