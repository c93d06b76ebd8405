"""Measures arms side by side over a workload, and compares their output with plain decoding."""
