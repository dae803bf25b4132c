"""The OpenAI-compatible HTTP server: HTTP in, token stream out.

    protocol.py    what a request may say, and its limits
    fields.py      single fields of it, and what errors say of them
    messages.py    the messages of a chat, and its tools
    structured.py  the fields that constrain an answer
    app.py         the ASGI application: the routes, and what every request passes on its way to them
    http.py        the generation routes: parse, hand to the engine, answer
    generation.py  one HTTP request -> one or more engine requests, aborted when the client leaves
    responses.py   deltas -> OpenAI JSON (whole answers and stream chunks)
    tools.py       what a template and `tool_choice` make of tools
    tool_parser.py calls out of an answer as it streams
    tokens.py      /tokenize and /detokenize
    information.py models, health, metrics, the batch's last steps, and the page in page/
    access.py      around and before every request: ids and the log; keys, the drain, the body's limits
    settings.py    what an operator may set
    errors.py      every error in OpenAI's form
    openapi.py     what /openapi.json says of bodies and errors
    context.py     what is known of the request at hand
    metrics.py     Prometheus metrics, named as vLLM names them
    telemetry.py   OpenTelemetry spans
    connection.py  one connection, with limits for clients that stop in the middle
    run.py         uvicorn: start, ready line, the drain

Nothing here imports torch: the server sees an AsyncEngine and a tokenizer, never a tensor.
"""
