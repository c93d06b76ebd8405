"""HTML reports: one file each, complete in itself."""
