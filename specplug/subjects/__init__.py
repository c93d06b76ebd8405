"""What `tune`, `bench` and `verify` measure from the outside: a server that answers over HTTP, or our own engine."""
