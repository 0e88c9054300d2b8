"""Tuning: from a trace to a policy. Numpy only; it reads what exits said and never runs a model."""
