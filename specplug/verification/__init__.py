"""The reference verification rules, and how two answers are compared."""
