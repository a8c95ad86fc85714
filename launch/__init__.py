"""Hardware profile, preflight and launchers; no torch."""
