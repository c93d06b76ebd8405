"""Tuning: finds the fastest profile for one model, machine and workload, and never one slower than plain decoding."""
