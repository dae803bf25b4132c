"""Offline batches: a file of requests in, a file of answers out (BatchLLM, 2412.03594)."""
