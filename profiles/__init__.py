"""Data only: the shipped profiles, one YAML file each."""
