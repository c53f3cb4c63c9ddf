"""Correct first, then timed: the oracle, device timing, bytes and operations."""
