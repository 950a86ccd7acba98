"""The floating-point operations of a distillation step, and the share of a device's peak that they make.

A product of [a, b] and [b, c] is 2abc operations. Counted are products alone, as the models need them:

- the linear layers of the blocks, 2 for each weight and token of a forward, 4 more for a backward; of experts, those
  alone that a token is sent to;
- attention's two products, at half of their squares, since a token reads none after it: 2 T^2 n_head head_size for a
  layer and sample of T tokens in a forward, twice that more for a backward;
- the LM heads at response tokens: 2 for each weight, 4 more for the student's backward.

A teacher has a forward alone; one that is cached has its head's product alone. Not counted are embeddings, norms,
softmax, the loss element by element, the optimizer, and whatever is computed twice, such as checkpointed blocks. PaLM
(arXiv 2204.02311) and torchtitan count attention's whole squares, nanoGPT counts 6 for each parameter: what they call
utilisation is higher by that.
"""

from litgpt.config import Config

from litgpt_akl.memory.estimate import MemoryEstimate
from litgpt_akl.models.model_size import measure_size

PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "GH200": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
}
"""Dense bfloat16 operations a second by NVIDIA's data sheets, by a part of a device's name; the first that fits."""


def published_peak(device_name: str) -> float | None:
    """What the data sheet promises, None of an unknown device."""
    return next((peak for name, peak in PEAKS.items() if name.lower() in device_name.lower()), None)


def body_forward(config: Config, tied: bool, samples: int, length: int) -> int:
    """Operations of a model's blocks in a forward."""
    size = measure_size(config, tied)
    idle = 1 - config.n_expert_per_token / config.n_expert if config.n_expert else 0
    products = 2 * round(size.products - idle * size.of_experts) * samples * length
    attention = 2 * length**2 * config.n_head * config.head_size * config.n_layer * samples
    return products + attention


def head_forward(config: Config, tokens: int) -> int:
    """Operations of the LM head's product."""
    return 2 * config.padded_vocab_size * config.n_embd * tokens


def step_operations(estimate: MemoryEstimate) -> int:
    """Of a step whose tokens all count, as :func:`~gpu_benchmark.runs.steps_of` makes them."""
    samples, length = estimate.global_batch_size, estimate.sequence_length
    student = body_forward(estimate.student, estimate.student_tied, samples, length)
    student += head_forward(estimate.student, samples * length)
    teacher = head_forward(estimate.teacher, samples * length)
    if estimate.teacher_role == "live":
        teacher += body_forward(estimate.teacher, estimate.teacher_tied, samples, length)
    return 3 * student + teacher
