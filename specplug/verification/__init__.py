"""The reference verification rules, and where two answers differ."""
