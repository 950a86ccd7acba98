"""scripts/benchmarks/gpu.py, rehearsed on a CPU; and what training needs of other packages."""

import subprocess
import sys

from helpers.absent import environment_without

NOT_NEEDED = ("bokeh", "datasets", "nltk", "pandas", "pyarrow", "rouge_score", "scipy", "sklearn", "scikit_learn")
NOT_NEEDED += ("aiohttp", "litdata", "lm_eval", "matplotlib", "requests", "transformers", "accelerate")


def test_training_loads_without_what_only_data_and_reports_need(tmp_path):
    code = "import litgpt_akl.training.main, litgpt_akl.commands.finetune_akl"
    subprocess.run([sys.executable, "-c", code], env=environment_without(NOT_NEEDED, tmp_path), check=True, timeout=120)
