"""Speculative-decoding proposers for llama.cpp and vLLM. Importing this loads no engine."""

__version__ = "0.1.0"
