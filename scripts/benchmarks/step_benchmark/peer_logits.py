"""Whether a peer has the models that we have."""

from collections.abc import Callable

import torch

from step_benchmark.job import Job

TOLERANCE = 1e-3


@torch.no_grad()
def check_logits(job: Job, forwards: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> str:
    """How far a peer's logits for the first row are from LitGPT's, by role; raises RuntimeError if that is too far."""
    expected = torch.load(job.logits, weights_only=True)
    ids = torch.tensor([job.rows[0]["input_ids"]])
    differences = [(forward(ids)[0] - expected[role]).abs().max().item() for role, forward in forwards.items()]
    if not max(differences) <= TOLERANCE:
        raise RuntimeError(f"the logits differ by {max(differences):.1e} from LitGPT's")
    return f"logits are LitGPT's to {max(differences):.0e}"
