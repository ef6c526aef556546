"""Runs over commits: series, and the steps in them."""
