"""What a GPU would be asked for, with PyTorch's and bitsandbytes' own calls recorded; `tests/gpu` asks a real one."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers.memory_runs import ON_GPUS, make_estimate, model
from litgpt.config import Config
from litgpt.model import GPT

from litgpt_akl.data.steps import MicroBatch
from litgpt_akl.loss import blockwise
from litgpt_akl.memory.estimate import STREAM
from litgpt_akl.models.gpt import build_model, load_quantized
from litgpt_akl.teacher.teacher import Teacher


class Stream:
    """Stands for a CUDA stream; knows all that were made."""

    made: list["Stream"] = []

    def __init__(self) -> None:
        self.made.append(self)

    def wait_stream(self, other: "Stream") -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self) -> object:
        return object()


@pytest.fixture
def streams(monkeypatch) -> list[Stream]:
    """The streams that are made, beside the main one."""
    main = Stream()
    monkeypatch.setattr(Stream, "made", [])
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    return Stream.made


@pytest.mark.parametrize(("micro_batches", "expected"), [(1, 0), (2, 1), (5, 1)])
def test_a_teacher_has_one_stream_for_all_its_steps(streams, monkeypatch, micro_batches, expected):
    fabric = SimpleNamespace(device=torch.device("cuda"), world_size=1)
    teacher = Teacher(fabric, torch.nn.Linear(1, 1))
    monkeypatch.setattr(teacher, "_answer", lambda top_k, batch, live: (batch, batch.input_ids.float()))
    batches = [
        MicroBatch(torch.full((1, 2), number), torch.zeros(1), torch.zeros(1)) for number in range(micro_batches)
    ]
    for _ in range(40):
        answers = list(teacher.hidden_states(batches))
        assert [int(hidden[0, 0]) for _, hidden in answers] == list(range(micro_batches))
    assert len(streams) == expected


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_weights_are_quantized_on_their_way_from_the_cpu(kind, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    kinds = {"int8": bitsandbytes.nn.Int8Params, "nf4": bitsandbytes.nn.Params4bit}
    moved = []

    def to(self, device, *options):
        moved.append((self.data.device.type, device.type))
        return torch.empty(0, device=device)

    monkeypatch.setattr(kinds[kind], "to", to)
    config = Config(n_layer=2, n_embd=64, n_head=2, intermediate_size=128, padded_vocab_size=96, block_size=16)
    with torch.device("meta"):
        teacher = build_model(config, tied=False)
    # another device than the CPU, as a GPU is one
    load_quantized(teacher, GPT(config).state_dict(), kind, torch.float32, torch.device("meta"))
    assert moved == [("cpu", "meta")] * 4 * config.n_layer


@pytest.mark.parametrize(
    ("error", "dtype", "expected"),
    [
        (None, torch.bfloat16, torch.bfloat16),
        (None, torch.float32, torch.float32),
        (TypeError("mm() got an unexpected keyword argument 'out_dtype'"), torch.bfloat16, torch.float32),
        (NotImplementedError("'aten::mm.dtype_out' is not available"), torch.float16, torch.float32),
    ],
)
def test_half_precision_is_multiplied_where_products_come_in_float32(monkeypatch, error, dtype, expected):
    def product(*operands, out_dtype, out):
        if error is not None:
            raise error

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(torch, "addmm", product)
    blockwise.sums_in_float32.cache_clear()
    hidden = SimpleNamespace(is_cuda=True, device=torch.device("cpu"), dtype=dtype)
    try:
        with nullcontext() if error is None else pytest.warns(UserWarning, match="The LM heads multiply in float32"):
            assert blockwise._product_dtype(hidden) == expected
    finally:
        blockwise.sums_in_float32.cache_clear()


def test_this_pytorch_has_the_products_that_cuda_is_asked_for():
    for operator in (torch.ops.aten.mm, torch.ops.aten.addmm):
        assert {"dtype", "dtype_out"} <= set(operator.overloads())


def test_the_memory_of_the_teachers_stream_is_predicted_where_there_is_one():
    one = make_estimate(model(2, 128, 512), model(4, 256, 512), device="cuda", micro_batch_size=2)
    several = one.moments
    assert all(moment.parts[STREAM] > 0 for moment in several)
    whole_step = make_estimate(model(2, 128, 512), model(4, 256, 512), device="cuda", micro_batch_size=4)
    for estimate in (whole_step, ON_GPUS):
        assert all(moment.parts[STREAM] == 0 for moment in estimate.moments)
