"""The model judge: requests to OpenAI-compatible endpoints."""
