"""The command `specplug`: click commands, one file each, without logic of their own. Imported as specplug_cli."""
