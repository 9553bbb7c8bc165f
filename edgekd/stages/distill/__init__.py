"""Prepare data, rehearse a lesson, teach it, grade what was learnt."""
