"""Kinds of data set, one file each."""
