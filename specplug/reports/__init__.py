"""HTML reports. Each one is a single file that needs nothing else."""
