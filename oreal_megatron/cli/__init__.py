"""Commands, one module each with a `main`; `python -m oreal_megatron.cli.NAME` runs them too."""
