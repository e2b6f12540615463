"""Probe of a machine, and checks of a run's requirements against it. Imports no torch."""
