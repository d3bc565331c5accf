"""Adapters of strangers, checked and read as changes of a backbone's weights."""
