"""Adapters in, meta-LoRAs and data sets out."""
