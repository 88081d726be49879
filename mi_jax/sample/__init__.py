"""Sampling: window plans, guidance, the sliding-window sampler, and the avatar that joins every model."""
