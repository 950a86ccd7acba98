"""Files and directories: whole or not at all, known when they change, locked, checked."""
