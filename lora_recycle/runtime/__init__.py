"""What every stage runs on: settings, files that are whole or absent, processes, untrusted input."""
