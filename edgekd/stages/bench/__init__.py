"""Measure here, and judge what was seen: ratios, intervals, gates."""
