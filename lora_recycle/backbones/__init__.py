"""Frozen vision transformers, and which of their tokens are computed."""
