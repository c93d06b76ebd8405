"""Transforms that run once and write model files which an engine loads: trimmed heads, other weight formats."""
