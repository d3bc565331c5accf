"""The model that users wear."""
