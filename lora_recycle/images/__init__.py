"""Pictures in the forms in which users keep them, decoded and labelled."""
