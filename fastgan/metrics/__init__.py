"""Measures of what a network has learnt."""
