"""The portable file: write it, read it, look into it."""
