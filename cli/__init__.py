"""The command `specplug`: click commands, one file each, without logic. Imported as specplug_cli."""
