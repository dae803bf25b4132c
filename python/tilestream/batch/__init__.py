"""Offline batches: a file of requests in, a file of answers out, in the order that shares the most (BatchLLM, 2412.03594)."""
