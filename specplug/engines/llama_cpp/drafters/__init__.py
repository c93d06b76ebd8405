"""Models that draft for another model on llama.cpp."""
