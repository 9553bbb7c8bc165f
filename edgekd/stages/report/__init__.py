"""Tell it: pages, plots, tables."""
