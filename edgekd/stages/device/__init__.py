"""Measure elsewhere: the bundle that travels, the way there, the results that come back."""
