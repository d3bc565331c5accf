"""Pages for people: single HTML files that hold everything they show and need no network."""
