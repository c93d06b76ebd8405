"""What is asked of an engine and what it returns: requests, answers, text, counters."""
