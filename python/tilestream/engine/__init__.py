"""The engine: which tokens run when, whose KV is where, and what each request's reader gets. See README.md."""
