"""Every optimizer of PyTorch: one process and two take the same steps and resume them, or it is refused by name."""

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.ranks import in_processes
from helpers.runs import distil
from torch import distributed

from litgpt_akl.config.args import LoRAArgs
from litgpt_akl.memory.estimate import try_optimizer
from litgpt_akl.messages import UserError
from litgpt_akl.training.optimizer import check_optimizer, make_optimizer

STEPS = {"max_steps": 4, "global_batch_size": 7, "micro_batch_size": 2, "save_interval": 2, "max_norm": 0.5}
UNSEEN = {"initial_validation": False, "final_validation": False}
DECAY = {"weight_decay": 0.1, "maximize": True}

ACCEPTED = {
    "ASGD": [{}, DECAY],
    "Adadelta": [{}, DECAY],
    "Adagrad": [{}, DECAY | {"lr_decay": 0.1, "initial_accumulator_value": 0.1}],
    "Adam": [{}, DECAY | {"amsgrad": True}],
    "AdamW": [{}, DECAY | {"amsgrad": True}],
    "Adamax": [{}, DECAY],
    "NAdam": [{}, DECAY | {"decoupled_weight_decay": True}],
    "RAdam": [{}, DECAY | {"decoupled_weight_decay": True}],
    "RMSprop": [{}, DECAY | {"centered": True, "momentum": 0.9}],
    "SGD": [{}, DECAY | {"momentum": 0.9, "nesterov": True}],
}
"""Options of those that one process and many can use."""
ALONE = {"Adafactor": [{}, DECAY], "Rprop": [{}, {"maximize": True}]}
"""Of those that only one process can."""
OF_MATRICES = {"Muon": [{}, {"nesterov": False}]}
"""Of those that only one process can, for adapters alone."""
NEVER = {"LBFGS": "closure", "SparseAdam": "dense gradients"}
"""What those say that none can."""


def config(name: str, options: dict) -> dict:
    return {"class_path": name if "." in name else f"torch.optim.{name}", "init_args": {"lr": 1e-4, **options}}


def check(optimizer, processes: int, **changes) -> bool:
    options = {"min_lr": 0.0, "vectors": True, "dtype": torch.float32, "num_nodes": 1, "cuda": False, **changes}
    return check_optimizer(optimizer, devices=processes, **options)


def cases(*tables: dict) -> list[tuple[str, dict]]:
    return [(name, options) for table in tables for name, sets in table.items() for options in sets]


def test_every_class_of_torch_optim_is_known():
    classes = {name for name, value in vars(torch.optim).items() if isinstance(value, type)}
    assert classes - {"Optimizer"} == {*ACCEPTED, *ALONE, *OF_MATRICES, *NEVER}


@pytest.mark.parametrize("cuda", [False, True])
def test_each_is_accepted_or_refused_by_name(cuda):
    """On GPUs PyTorch works on many parameters at once by itself, by operations that have rules of their own."""
    for name, options in cases(ACCEPTED):
        for processes in (1, 2):
            check(config(name, options), processes, cuda=cuda)
    for table, vectors in ((ALONE, True), (ALONE, False), (OF_MATRICES, False)):
        for name, options in cases(table):
            assert check(config(name, options), 1, vectors=vectors, cuda=cuda)
            with pytest.raises(UserError, match=f"torch.optim.{name} with --devices 2 --num_nodes 1: .*\n.*AdamW"):
                check(config(name, options), 2, vectors=vectors, cuda=cuda)
    for name, reason in (NEVER | {"Muon": "only supports 2D"}).items():
        for processes in (1, 2):
            with pytest.raises(UserError, match=f"{name}.*{reason}"):
                check(config(name, {}), processes, cuda=cuda)
    assert not distributed.is_initialized()


def test_what_is_fused_for_shared_parameters_has_a_rule_for_them():
    fused = {}
    for name, options in cases(ACCEPTED):
        for processes in (1, 2):
            make = partial(make_optimizer, config(name, options), fused=check(config(name, options), processes))
            _, is_fused = try_optimizer(make, torch.float32)
            fused.setdefault(processes, set()).update([name] if is_fused else [])
    assert fused == {1: {"Adagrad", "Adam", "AdamW", "SGD"}, 2: {"Adam", "AdamW"}}
    told = config("SGD", {"fused": True})
    assert check(told, 1)
    with pytest.raises(UserError, match="torch.optim.SGD with --devices 2.*_fused_sgd_"):
        check(told, 2)


class OwnSteps(torch.optim.Optimizer):
    """Steps along the gradient, as long as what this process has of the parameter."""

    def __init__(self, params, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                own = [getattr(tensor, "_local_tensor", tensor) for tensor in (parameter, parameter.grad)]
                own[0].sub_(own[1] * own[0].norm(), alpha=group["lr"])


class Failing(OwnSteps):
    def step(self, closure=None):
        raise ConnectionError("it does not work")


def test_an_optimizer_of_somebody_is_tried_as_any_other():
    for name, wrong in (
        ("test_optimizers.OwnSteps", "it takes other steps than on whole ones"),
        ("bitsandbytes.optim.AdamW8bit", "parameters that processes share are too much for it"),
    ):
        assert check(config(name, {}), 1)
        with pytest.raises(UserError, match=f"{name} with --devices 2 --num_nodes 1: .*{wrong}"):
            check(config(name, {}), 2)
    with pytest.raises(UserError, match="Failing can take no steps here: it does not work"):
        check(config("test_optimizers.Failing", {}), 1)


def test_no_config_is_changed():
    optimizer = config("SGD", {})
    make_optimizer(optimizer, torch.nn.Linear(1, 1))
    assert optimizer == config("SGD", {})


def run_all(chosen, processes, student, teacher, data, out_dir, **changes) -> None:
    """Two runs for each optimizer, the second of which goes on from the middle of the first."""
    torch.set_num_threads(1)
    for number, (name, options) in enumerate(chosen):
        directory, optimizer = out_dir / f"{processes}-{number}", config(name, options)
        run = partial(distil, student, teacher, data, optimizer=optimizer, train=STEPS, eval=UNSEEN, devices=processes)
        run(directory / "whole", **changes)
        run(directory / "resumed", resume=directory / "whole" / "step-000002", **changes)


def weights(out_dir: Path, number: int, processes: int, name: str = "whole") -> dict[str, torch.Tensor]:
    return torch.load(out_dir / f"{processes}-{number}" / name / "final" / "lit_model.pth", weights_only=True)


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


FEW = ("AdamW", "SGD")


@pytest.mark.parametrize(
    ("precision", "chosen"),
    [
        pytest.param("32-true", cases({name: ACCEPTED[name] for name in FEW}), id="two"),
        pytest.param(
            "32-true",
            cases({name: options for name, options in ACCEPTED.items() if name not in FEW}),
            id="others",
            marks=pytest.mark.slow,
        ),
        # those that keep numbers in another type than the parameters'
        pytest.param("bf16-true", [("NAdam", {}), ("ASGD", DECAY)], id="half precision", marks=pytest.mark.slow),
    ],
)
def test_one_process_and_two_take_the_same_steps_and_resume_them(
    student_dir, teacher_dir, short, tmp_path, precision, chosen
):
    start = torch.load(student_dir / "lit_model.pth", weights_only=True)
    for processes in (1, 2):
        run = partial(run_all, precision=precision)
        in_processes(processes, run, chosen, processes, student_dir, teacher_dir, short.json_path, tmp_path)
        for number, case in enumerate(chosen):
            assert difference(*(weights(tmp_path, number, processes, name) for name in ("whole", "resumed"))) == 0, case
    for number, case in enumerate(chosen):
        one, two = (weights(tmp_path, number, processes) for processes in (1, 2))
        moved = difference(one, start)
        if precision == "32-true":
            assert difference(one, two) < min(1e-6, moved / 10), case
        assert moved > 1e-7, case


def test_what_one_process_alone_can_use_goes_on_as_well(student_dir, teacher_dir, short, tmp_path):
    run_all(cases(ALONE), 1, student_dir, teacher_dir, short.json_path, tmp_path / "all")
    run_all(cases(OF_MATRICES), 1, student_dir, teacher_dir, short.json_path, tmp_path / "lora", lora=LoRAArgs(r=4))
    run_all([("bitsandbytes.optim.AdamW8bit", {})], 1, student_dir, teacher_dir, short.json_path, tmp_path / "bits")
    for directory in tmp_path.glob("*/1-*"):
        whole, resumed = (torch.load(directory / name / "final" / "lit_model.pth") for name in ("whole", "resumed"))
        assert difference(whole, resumed) == 0, directory
    assert len(list(tmp_path.glob("*/1-*"))) == 7


@pytest.mark.parametrize("name", ["Adafactor", "Rprop", "SparseAdam", "LBFGS", "Muon"])
def test_a_refusal_comes_before_anything_is_read(tmp_path, name):
    with pytest.raises(UserError, match=name):
        distil(
            tmp_path / "none", tmp_path / "neither", tmp_path, tmp_path / "out", optimizer=config(name, {}), devices=2
        )
    assert not list(tmp_path.iterdir())
