"""What `specplug build` makes: drafters, from measured frequencies and with measured costs."""
