"""Torch tools that methods share: trainer, taps, layer survey, losses."""
