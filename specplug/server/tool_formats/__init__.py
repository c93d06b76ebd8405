"""How models write tool calls: one description per family, a grammar that constrains them, and a reader.

Nothing here depends on an engine, a request or HTTP.
"""
