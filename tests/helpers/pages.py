"""Made-up runs for the report's tests."""

from pathlib import Path
from typing import Any

import numpy as np

from litgpt_akl.report.history import History

OLD_NAMES = {"teacher_answers": "teacher", "answers": "student"}
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
            **{"next_rank": number * 7, "next_p": 0.01, "next_q": 0.02},
            "tokens": [EVIL, "\n", " ", "", "$$\\frac{a}{b}$$", *(f" token {n}" for n in range(19))],
            **{"p": p[:24].tolist(), "q": q[:24].tolist(), "p_others": p[24:].sum(), "q_others": q[24:].sum()},
            **{"others": 476, "head": head, "head_mass": p[:head].sum()},
            **{"head_gap": np.abs(p - q)[:head].sum(), "tail_gap": np.abs(p - q)[head:].sum()},
        }

    def text(content: str) -> dict[str, Any]:
        likely = [[EVIL, 0.5], [" ", 0.25], ["\n", 0.125], ["", 0.0625], ["$$x^2$$", 0.01]]
        kl = [*random.exponential(size=40), float("nan")]
        pieces = [(EVIL, " a", "", "\n")[place % 4] for place in range(len(kl))]
        tokens = [[piece, value, likely, likely[::-1]] for piece, value in zip(pieces, kl, strict=True)]
        return {"tokens": tokens, "rest": content, "ids": [1] * 50}

    texts = [EVIL, "An instruction\n" * 10, "x" * 500]
    answers = [{"prompt": each, **dict.fromkeys(("recorded", "teacher", "student"), text(each))} for each in texts]
    parts = [[False, f"user: {EVIL}"], [True, f"{EVIL}<end>"]]
    sample = {"texts": EVIL, "labels": EVIL, "place": f"{EVIL}.json, line 1", "parts": parts}
    run = {"steps": 9, "facts": {"Student": "2 layers, 0.1 M parameters", "torch version": EVIL}}
    snapshot = {"sample": sample, "run": run, "answers": answers, "note": ""}
    positions = [position(number) for number in range(6)]
    return {name: {"step": step, **snapshot, "positions": positions} for name, step in (("first", 0), ("latest", 9))}


def text_of(text: dict[str, Any]) -> str:
    """Of a kept text, without its end."""
    return "".join(token[0] for token in text["tokens"] if token[0] != "<end>") + text["rest"]


def of_an_earlier_version(snapshot: dict[str, Any]) -> dict[str, Any]:
    """The same snapshot as versions kept it that did not compare texts."""
    old = {name: snapshot[name] for name in ("step", "note", "sample", "positions")}
    answers = snapshot["answers"]
    old["prompts"] = [answer["prompt"] for answer in answers]
    old |= {name: [text_of(answer[role]) for answer in answers] for name, role in OLD_NAMES.items()}
    return old
