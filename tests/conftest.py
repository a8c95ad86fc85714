"""Settings that must stand before any test module is imported."""

import os

import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, and several libraries import Triton: later is too late.
    os.environ.setdefault("TRITON_INTERPRET", "1")
