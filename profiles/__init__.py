"""The shipped profiles, one YAML file each; this package holds data only."""
