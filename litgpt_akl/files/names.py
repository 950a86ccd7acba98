"""The names of what a run writes into its ``--out_dir`` and into its checkpoints."""

FINAL, FINAL_HF = "final", "final-hf"
"""The trained student, and the same for Hugging Face's libraries."""
RECIPE, PAGE, EXAMPLES = "hyperparameters.yaml", "report.html", "examples.json"
METRICS_MARK = "metrics.json"
"""A checkpoint's file that says which rows are its own; the rows themselves stay in the run's log."""
METRICS_COPY = "metrics.csv"
"""In place of it, checkpoints of earlier versions hold the rows."""
