"""Checkpoints: written while training goes on, committed by a marker, verified before they are read."""
