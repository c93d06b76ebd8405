"""The data that an engine receives and returns: requests, answers, text and counters."""
