"""This computer: its hardware, atomic writing of files, and the fingerprint of a measurement made on it."""
