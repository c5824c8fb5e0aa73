"""Recipes that ship with Tilewright, as YAML: `tilewright train NAME` starts from one."""
