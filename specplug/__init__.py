"""Speculative-decoding proposers for llama.cpp. Importing this loads no engine."""

__version__ = "0.1.0"
