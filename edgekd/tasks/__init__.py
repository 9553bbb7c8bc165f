"""What networks learn, one task per file."""
