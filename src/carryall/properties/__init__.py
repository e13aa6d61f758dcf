"""What people compute with a potential, and how it is shown."""
