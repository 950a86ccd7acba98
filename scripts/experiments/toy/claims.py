"""What the paper claims of the divergences, against what was measured; a verdict follows from counts of seeds alone.

A finding is met if it is seen in at least nine tenths of the seeds. A claim holds if all of its findings are met, holds
in part if some are, and does not hold if none is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from toy.setups import PAPER_SETUPS
from toy.training import CONVERGED, LABELS, Run

MET = 0.9
"""Share of the seeds."""
EARLY = range(3, 16)
"""Steps at which heads and tails are compared."""
APPROACH = range(1, 51)
"""Steps over which errors are averaged; after them all are small."""
_ROUNDING = 1e-9
Results = dict[str, dict[str, Run]]
"""Runs by set-up and divergence."""


@dataclass(frozen=True)
class Finding:
    """In how many seeds something was seen on one set-up."""

    what: str
    setup: str
    seen: int
    seeds: int

    @property
    def met(self) -> bool:
        return self.seen >= MET * self.seeds


@dataclass(frozen=True)
class Claim:
    text: str
    findings: Sequence[Finding]
    remark: str = ""

    @property
    def verdict(self) -> str:
        met = [finding.met for finding in self.findings]
        return "holds" if all(met) else "holds in part" if any(met) else "does not hold"

    @property
    def measured(self) -> str:
        """The findings, those of the same thing together."""
        cells = []
        for what, findings in groupby(self.findings, key=lambda finding: finding.what):
            counts = ", ".join(f"{f.setup.replace('_', ' ')} {f.seen}/{f.seeds}" for f in findings)
            cells.append(f"{what}: {counts}")
        return "; ".join(cells) + (f" ({self.remark})" if self.remark else "")


def finding(what: str, setup: str, seen: Tensor) -> Finding:
    """Of a boolean for each seed."""
    return Finding(what, setup, int(seen.sum()), len(seen))


def ahead(results: Results, setup: str, name: str, rival: str, part: str) -> Finding:
    """Whether one divergence has the smaller error on a part at every early step."""
    errors, others = (
        results[setup][divergence].measures[part][EARLY.start : EARLY.stop] for divergence in (name, rival)
    )
    what = f"{LABELS[name]} ahead on the {part.replace('_', ' ')} at every step {EARLY.start}-{EARLY.stop - 1}"
    return finding(what, setup, (errors < others).all(dim=0))


def steps_to_converge(run: Run) -> Tensor:
    """The step of each seed from which on its error stays below :data:`CONVERGED`; ``[seeds]``."""
    error = run.measures["error"]
    steps = torch.arange(1, len(error) + 1)[:, None]
    return (steps * (error >= CONVERGED)).amax(dim=0)


def approach(run: Run, part: str) -> Tensor:
    """The mean error of each seed over the steps of :data:`APPROACH`; ``[seeds]``."""
    return run.measures[part][APPROACH.start : APPROACH.stop].mean(dim=0)


def convergence(results: Results) -> Claim:
    findings, largest = [], 0.0
    for name in ("fkl", "rkl"):
        for setup in PAPER_SETUPS:
            final = results[setup][name].measures["error"][-1]
            largest = max(largest, final.max().item())
            findings.append(finding(f"{LABELS[name]} ends with an error below {CONVERGED}", setup, final < CONVERGED))
    text = "Forward and reverse KL have the same optimum and both converge to it; none seeks a mode or a mean"
    return Claim(text, findings, f"largest {largest:.1e}")


def faster(results: Results, rivals: Sequence[str]) -> Iterator[Finding]:
    for rival in rivals:
        for setup in PAPER_SETUPS:
            steps, others = (steps_to_converge(results[setup][name]) for name in ("akl", rival))
            yield finding(f"fewer steps than by {LABELS[rival]}", setup, steps < others)


def as_good(results: Results, rivals: Sequence[str]) -> Iterator[Finding]:
    span = f"steps {APPROACH.start}-{APPROACH.stop - 1}"
    for rival in rivals:
        for part in ("head", "tail"):
            errors, others = (approach(results["long_tail"][name], part) for name in ("akl", rival))
            yield finding(
                f"mean {part} error of {span} no larger than by {LABELS[rival]}", "long_tail", errors <= others
            )


def weight(results: Results) -> Claim:
    """Of ``h``, as defined and in its range."""
    findings = []
    for setup in PAPER_SETUPS:
        measures = results[setup]["akl"].measures
        expected = measures["head"] / (measures["head"] + measures["tail"])
        unequal = ((measures["h"] - expected).abs() > _ROUNDING) & (measures["error"] >= CONVERGED)
        findings.append(finding("head error / (head + tail error) at every step", setup, ~unequal.any(dim=0)))
    largest = results["one_token"]["akl"].measures["h"].amax(dim=0)
    findings.append(finding("at most 1/2 at every step", "one_token", largest <= 0.5 + _ROUNDING))
    return Claim("h is the head's share of the error; where the head is one id, never above 1/2", findings)


def claims(results: Results) -> list[Claim]:
    """Every claim with its findings."""
    medians = {name: steps_to_converge(run).median().item() for name, run in results["long_tail"].items()}
    steps = ", ".join(f"{LABELS[name]} {median:.0f}" for name, median in medians.items())
    rivals = ("fkl", "rkl", "mix")
    return [
        convergence(results),
        Claim("Forward KL fits the head first", [ahead(results, "long_tail", "fkl", "rkl", "head")]),
        Claim(
            "The same on the Gaussians (not claimed)",
            [ahead(results, setup, "fkl", "rkl", "head") for setup in ("bimodal", "unimodal")],
        ),
        Claim(
            "Reverse KL fits the tail first",
            [ahead(results, "long_tail", "rkl", "fkl", part) for part in ("far_tail", "tail")],
        ),
        Claim("Adaptive KL converges faster", [*faster(results, rivals)], f"median on the long tail: {steps}"),
        Claim("Adaptive KL is at least as good on head and tail", [*as_good(results, rivals)]),
        Claim("It does so by adapting (our control)", [*faster(results, ["static"]), *as_good(results, ["static"])]),
        weight(results),
    ]


def table(rows: Sequence[Claim]) -> str:
    """Markdown."""
    lines = ["| claim | in how many seeds | verdict |", "|---|---|---|"]
    return "\n".join(lines + [f"| {claim.text} | {claim.measured} | {claim.verdict} |" for claim in rows])
