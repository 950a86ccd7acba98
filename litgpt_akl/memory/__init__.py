"""How much memory a run will take on each device, before it starts."""
