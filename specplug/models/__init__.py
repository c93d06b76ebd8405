"""Model references, the GGUF header, packaged demo models, and the folders of drafters built from models."""
