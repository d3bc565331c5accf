"""The page that classifies a visitor's own images: `lora-recycle app`, and the same as a Space."""
