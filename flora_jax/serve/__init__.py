"""Serving: requests, sampling, the jitted prefill and decode steps, and what drives them."""
