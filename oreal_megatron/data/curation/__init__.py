"""Preparation of prompt files: import from other formats, checks, duplicates, overlap with benchmarks."""
