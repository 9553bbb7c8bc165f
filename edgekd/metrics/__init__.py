"""Metrics: numbers derived from samples. A module defines several, by name, in its table PLUGINS."""
