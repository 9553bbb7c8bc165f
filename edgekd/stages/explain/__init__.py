"""Stage: why an INT8 file is not faster or not accurate, and what to change. Begin with explain.py."""
