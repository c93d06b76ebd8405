"""Model references, and the folders of drafters built from models."""
