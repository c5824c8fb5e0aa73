"""The clone's benchmarks are importable in these tests."""

from tilewright.cli.clone import load_benchmarks

load_benchmarks()
