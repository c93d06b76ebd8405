"""Tuning a server that is measured from the outside: what it could draft, what that costs, and which is fastest."""
