"""Surrogate data on disk: shards of images with what their adapter says of them."""
