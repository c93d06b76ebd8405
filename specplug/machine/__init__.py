"""This computer: its hardware, its files, and the identity of a measurement made on it."""
