"""Runs as SLURM jobs: the site, checks before submission, the batch script, servers of a node."""
