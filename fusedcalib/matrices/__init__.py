"""Optimizers whose step is of whole matrices: Muon."""
