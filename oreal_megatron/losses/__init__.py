"""The objective of OREAL (arXiv 2502.06781) and of baselines: pure functions, fp32, natural logarithms."""
