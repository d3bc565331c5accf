"""Few-shot evaluation on real images."""
