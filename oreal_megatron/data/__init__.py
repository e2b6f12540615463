"""Data of a run: prompts, prompt stream, rendering, tokenizer, and packed token batches."""
