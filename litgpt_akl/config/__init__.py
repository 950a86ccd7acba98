"""The options: groups, which of them go together, and the resolved recipe."""
