"""Deciding what to verify: acceptance, measured costs, and the choice made from both."""
