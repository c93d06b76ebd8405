"""An OpenAI-compatible server on an engine that answers many at once.

Knows HTTP, queues and OpenAI's shapes. What it asks of an engine is in `scheduler.py`.
"""
