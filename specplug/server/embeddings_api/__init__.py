"""The server for embedding models: OpenAI's and llama-server's paths for embeddings."""
