"""The page that shows how a run went: what was logged, answers, and distributions at a few positions."""
