"""Attention apart from any backend: how a spec is lowered, what a layer does, how partial results merge."""
