"""Whole optimizer steps: what is measured is the trainer's own functions, as `tilewright train` calls them."""
