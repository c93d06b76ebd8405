"""Models that draft for a target model on llama.cpp."""
