"""Ollama's interface: /api/chat, /api/generate, and what its clients ask for about the model."""
