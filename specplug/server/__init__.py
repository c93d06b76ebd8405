"""An OpenAI-compatible HTTP server on an engine that generates many answers at once.

It covers HTTP, queueing and OpenAI's JSON format. It depends on no engine: `engine_protocol.py` and the `Loop` protocol
in `scheduler.py` state what an engine must implement.
"""
