"""The commands of this package; importing it imports nothing."""
