"""What the demo's training did: held-out prompts answered greedily before it, after it and by the teacher."""

import json
import sys
from contextlib import redirect_stderr
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap

from litgpt import LLM
from litgpt.utils import CLI

from litgpt_akl.messages import CONTROL, UserError

PICKED = ("How to clean a toilet.", "How to keep herbs from wilting?", "To remove the seeds from a butternut squash")
"""Of the held-out instructions."""
EXPECTED = """\
Five minutes on two cores give whole sentences that begin well.
Facts and sense take more steps: raise --train.max_steps in scripts/demo.sh."""
WIDTH = 25
"""Columns of each of three answers."""


def show_demo(*, teacher: Path, student: Path, run: Path, data: Path, max_new_tokens: int = 40) -> None:
    """Print answers side by side, what to expect of them, and where the report is.

    Args:
        teacher: The teacher's checkpoint directory.
        student: The student's before training.
        run: The run's ``out_dir``.
        data: Held-out records, a JSON list.
        max_new_tokens: Length of an answer.
    """
    held_out = {record["instruction"] for record in json.loads(data.read_text(encoding="utf-8"))}
    if missing := [prompt for prompt in PICKED if prompt not in held_out]:
        raise UserError(f"{data} has no record {missing[0]!r}.\nRemove its directory, and prepare it again.")
    print("\nThree held-out prompts, answered greedily:")
    models = {"Student at step 0": student, "Student after training": run / "final", "Teacher": teacher}
    answers = {name: answer(path, PICKED, max_new_tokens) for name, path in models.items()}
    for number, prompt in enumerate(PICKED):
        print(f"\n> {prompt}\n{side_by_side({name: texts[number] for name, texts in answers.items()})}")
    print(f"\n{EXPECTED}\nThe report: {run / 'report.html'}")


def answer(checkpoint_dir: Path, prompts: tuple[str, ...], max_new_tokens: int) -> list[str]:
    """Greedy answers, in float32."""
    llm = LLM.load(str(checkpoint_dir), distribute=None)
    # LitGPT tells of devices and precision here
    with redirect_stderr(StringIO()):
        llm.distribute(accelerator="auto", devices=1, precision="32-true")
    return [llm.generate(text, max_new_tokens=max_new_tokens, top_k=1) for text in prompts]


def side_by_side(texts: dict[str, str]) -> str:
    """Texts in columns below their names."""
    columns = [
        [name, "-" * len(name), *wrap(CONTROL.sub("", " ".join(text.split())) or "(nothing)", WIDTH)]
        for name, text in texts.items()
    ]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join("  ".join(f"{cell:{WIDTH}}" for cell in row).rstrip() for row in rows)


if __name__ == "__main__":
    try:
        CLI(show_demo)
    except UserError as error:
        sys.exit(str(error))
