"""What OREAL optimises (arXiv 2502.06781): pure functions in one process, fp32, natural logarithms."""
