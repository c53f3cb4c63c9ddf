"""One thread: the tensors here are so small that two threads mostly wait for each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
