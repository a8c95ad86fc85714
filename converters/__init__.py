"""Hugging Face <-> Megatron-Core weights: mapping tables, safetensors I/O, load, export, adapters."""
