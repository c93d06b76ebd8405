"""llama-server's own interface: /completion, /infill, /props and /slots."""
