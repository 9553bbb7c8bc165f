"""Prepare a data set, dry-run a method, train with it, evaluate the student."""
