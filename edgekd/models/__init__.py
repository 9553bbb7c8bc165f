"""Student and teacher families, one file each."""
