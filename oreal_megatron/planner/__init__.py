"""Estimates of a run before it is started: memory, step time, disk. Imports no torch."""
