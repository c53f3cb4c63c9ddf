"""The engine: a model, a backend and a cache put together; extend passes, and decode steps as CUDA graphs."""
