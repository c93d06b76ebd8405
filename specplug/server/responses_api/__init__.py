"""OpenAI's Responses interface: /v1/responses, without kept responses."""
