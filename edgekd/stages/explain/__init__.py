"""Stage: why an INT8 file is not faster or not accurate, and the switch to change. Begin with look.py."""
