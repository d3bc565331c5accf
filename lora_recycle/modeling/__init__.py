"""The model that people use: fit, predict, save, export, serve."""
