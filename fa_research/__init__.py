"""A laboratory for Flash-Attention serving.

Importing the package loads neither torch, Triton, JAX nor W&B: every part imports what it needs when it is used.
"""

from __future__ import annotations

__version__ = "0.1.0"
