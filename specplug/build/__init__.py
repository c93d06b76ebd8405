"""Builds the drafters of `specplug build`, from counted token frequencies and with measured costs."""
