"""Numbers derived from a trial, one pure function per file."""
