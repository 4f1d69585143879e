"""Measures steps, and predicts what they cost; cli.py has the commands."""
