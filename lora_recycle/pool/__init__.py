"""Many adapters of one backbone: averaged, clustered, and trained."""
