"""Audit, benchmarks and comparisons with peers: part of the repository, imported as ``tilewright.benchmarks``.

`tilewright.cli.clone.load_benchmarks` makes that name known; the folder is not installed.
"""
