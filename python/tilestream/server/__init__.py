"""The OpenAI-compatible HTTP server: HTTP in, token stream out.

    protocol.py    what a request may say, and its limits
    http.py        routes: parse, hand to the engine, answer
    generation.py  one HTTP request -> one or more engine requests, aborted when the client leaves
    responses.py   deltas -> OpenAI JSON (whole answers and stream chunks)
    errors.py      every error in OpenAI's form, and the limit on a body's size
    metrics.py     Prometheus metrics, named as vLLM names them
    run.py         uvicorn: start, ready line, graceful stop

Nothing here imports torch: the server sees an AsyncEngine and a tokenizer, never a tensor.
"""
