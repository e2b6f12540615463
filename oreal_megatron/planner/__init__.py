"""Before a run: what it will need, how it is submitted, what is missing. No torch at import."""
