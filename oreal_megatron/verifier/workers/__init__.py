"""Processes that compare symbolic answers within limits of time and memory."""
