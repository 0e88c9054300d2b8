"""Segments on a GPU: what is enqueued when, and what waits for what. CUDA and TensorRT have one door each."""
