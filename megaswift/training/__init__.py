"""The loop, optimizer, schedule, metrics."""
