"""Finding, for one model on one machine and one kind of work, the profile that is fastest and never slower."""
