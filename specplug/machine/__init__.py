"""This computer: its hardware and limits, the user's folders, atomic writing, and the fingerprint of a measurement."""
