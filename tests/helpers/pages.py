"""Made-up runs for the report's tests."""

from pathlib import Path
from typing import Any

import numpy as np

from litgpt_akl.report.history import History

EVIL = "</script><script>fail()</script><b>bold</b> $$x^2$$ \x1b[31m\x00 \ud800 &amp;"


def log(run_dir: Path, text: str, version: int = 0) -> None:
    """Lets a directory hold a run's CSV log."""
    directory = run_dir / "logs" / "csv" / f"version_{version}"
    directory.mkdir(parents=True)
    (directory / "metrics.csv").write_text(text)


def made_up(name: str, steps: int, seed: int = 0) -> History:
    """A run with all that is ever logged, as noisy as real ones."""
    random = np.random.default_rng(seed)
    training: dict[str, np.ndarray] = {"step": np.arange(1.0, steps + 1)}
    validation = {"step": np.linspace(0, steps, 21).round()}
    nats = ("loss", "divergence", "cross_entropy", "teacher_cross_entropy", "forward_kl", "reverse_kl")
    shares = ("h", "agreement", "accuracy", "confidence", "teacher_accuracy", "teacher_confidence")
    others = ("head_gap", "tail_gap", "learning_rate", "gradient_norm", "tokens_per_second", "memory_gb", "tokens")
    for names, size in ((nats, 6.0), (shares, 0.5), ((*others, "response_tokens_per_second"), 1.0)):
        # runs laid over each other are to be seen beside each other
        scale = size * (1 + seed / 5)
        for column in names:
            falling = scale * np.exp(-3 * training["step"] / steps) + scale / 4
            training[column] = falling * random.lognormal(0, 0.1, steps)
            validation[column] = scale * np.exp(-3 * validation["step"] / steps) + scale / 4
    training["h_squared"] = training["h"] ** 2 + 0.01
    validation["ppl"], validation["gap_closed"] = np.exp(validation["cross_entropy"]), validation["step"] / steps
    recipe = {
        "checkpoint_dir": "checkpoints/a/student",
        "teacher_checkpoint_dir": "checkpoints/a/teacher",
        "distill": {"kd_ratio": 0.5, "divergence": "akl"},
        "train": {"global_batch_size": 16},
        "data": {"class_path": "litgpt.data.JSON", "init_args": {"json_path": f"{EVIL}.json"}},
    }
    return History(name, recipe, training, validation)


def made_up_examples(seed: int = 0) -> dict[str, Any]:
    """Examples whose texts try to break the page."""
    random = np.random.default_rng(seed)

    def position(number: int) -> dict[str, Any]:
        p, q = np.sort(random.dirichlet(np.full(500, 0.05)))[::-1], random.dirichlet(np.full(500, 0.05))
        head = int((p.cumsum() < 0.5).sum()) + 1
        return {
            "context": f"{number} {EVIL}",
            "next": EVIL,
            "tokens": [EVIL, "\n", " ", "", "$$\\frac{a}{b}$$", *(f" token {n}" for n in range(19))],
            **{"p": p[:24].tolist(), "q": q[:24].tolist(), "p_others": p[24:].sum(), "q_others": q[24:].sum()},
            **{"others": 476, "head": head, "head_mass": p[:head].sum()},
            **{"head_gap": np.abs(p - q)[:head].sum(), "tail_gap": np.abs(p - q)[head:].sum()},
        }

    texts = [EVIL, "An instruction\n" * 10, "x" * 500]
    parts = [[False, f"user: {EVIL}"], [True, f"{EVIL}<end>"]]
    sample = {"texts": EVIL, "labels": EVIL, "place": f"{EVIL}.json, line 1", "parts": parts}
    snapshot = {"sample": sample, "prompts": texts, "teacher_answers": texts, "answers": texts, "note": ""}
    positions = [position(number) for number in range(6)]
    return {name: {"step": step, **snapshot, "positions": positions} for name, step in (("first", 0), ("latest", 9))}
