"""Speculative decoding for llama.cpp and vLLM. Importing this package loads no engine."""

__version__ = "0.1.0"
