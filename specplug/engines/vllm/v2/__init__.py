"""specplug's proposers inside vLLM's V2 model runner: drafting on the device, without waiting for it."""
