"""Tuning: finds the profile that is fastest, and never slower than plain decoding, for one model, machine and workload."""
