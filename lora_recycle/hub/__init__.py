"""The Hugging Face Hub: repos fetched at one commit, pushed in one commit, described by cards."""
