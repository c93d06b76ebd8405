"""Measuring arms side by side over a workload."""
