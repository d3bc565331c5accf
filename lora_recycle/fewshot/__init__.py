"""Few-shot classification on embeddings: prototypes, heads, episodes, accuracy."""
