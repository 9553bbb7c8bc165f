"""The program that runs and times models, on the host and on devices alike, so that all figures come from one loop.

It needs Python 3.6, NumPy and one runtime, and imports nothing of edgekd. NumPy is imported in the functions that need
it, like the runtimes: `doctor` works without it, and a cold start counts how long its import takes.
"""
