"""Options that change over the steps of a run: their values, their limits, and runs that resume within."""

import pytest
import torch
from helpers.options import MODELS, arguments_of, make_parser
from helpers.runs import assert_same, distil, metrics

from litgpt_akl.config.distillation import DistillArgs, MixArgs, ScheduleArgs, SkewedArgs
from litgpt_akl.config.recipe import differences, recipe_as_yaml
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.memory.estimate import largest_loss
from litgpt_akl.messages import UserError
from litgpt_akl.report.history import read_history
from litgpt_akl.report.page import Shown, make_page


def test_values_of_each_step():
    args = DistillArgs(divergence="mix", schedule=ScheduleArgs(mix_ratio=(0.9, 0.3), temperature=(4.0, 1.0)))
    steps = 7
    for step in range(steps):
        wanted = {"mix_ratio": 0.9 - step * 0.6 / 6, "temperature": 4.0 - step * 3 / 6}
        loss = args.loss_of_step(step, steps)
        assert {name: getattr(loss, name) for name in wanted} == pytest.approx(wanted)
    # the ends are what was given, to the last digit; the loss of a run is that of its last step
    assert args.loss_of_step(0, steps) == DistillationLoss("mix", mix_ratio=0.9, temperature=4.0)
    assert args.loss_of_step(6, steps) == args.loss() == DistillationLoss("mix", mix_ratio=0.3, temperature=1.0)
    # a run of one step begins, and ends there
    assert args.loss_of_step(0, 1) == args.loss(0.0)
    skewed = DistillArgs(divergence="skewed_fkl", schedule=ScheduleArgs(skew=(0.5, 0.0)))
    assert [skewed.loss_of_step(step, 3).skew for step in range(3)] == [0.5, 0.25, 0.0]
    plain = DistillArgs(divergence="mix", mix=MixArgs(0.3))
    assert plain.loss_of_step(0, 3) == plain.loss_of_step(2, 3) == plain.loss()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"divergence": "akl", "schedule": ScheduleArgs(mix_ratio=(1.0, 0.5))},
            r"--distill.schedule.mix_ratio \[1.0, 0.5\] has no effect with --distill.divergence akl."
            " Use --distill.divergence mix, or leave it out",
        ),
        (
            {"divergence": "mix", "schedule": ScheduleArgs(skew=(0.1, 0.5))},
            "Use --distill.divergence skewed_fkl or skewed_rkl, or leave it out",
        ),
        (
            {"divergence": "mix", "mix": MixArgs(0.3), "schedule": ScheduleArgs(mix_ratio=(1.0, 0.5))},
            r"--distill.mix.ratio 0.3 has no effect with --distill.schedule.mix_ratio \[1.0, 0.5\]; remove it",
        ),
        (
            {"temperature": 2.0, "schedule": ScheduleArgs(temperature=(4.0, 1.0))},
            r"--distill.temperature 2.0 has no effect with --distill.schedule.temperature \[4.0, 1.0\]; remove it",
        ),
        (
            {"divergence": "mix", "schedule": ScheduleArgs(mix_ratio=(1.5, 0.5))},
            "--distill.schedule.mix_ratio must be between 0 and 1, got 1.5",
        ),
        (
            {"schedule": ScheduleArgs(temperature=(2.0, 0.0))},
            "--distill.schedule.temperature must be above 0, got 0.0",
        ),
        (
            {"divergence": "skewed_rkl", "skewed": SkewedArgs(1.5)},
            "--distill.skewed.skew must be at least 0 and below 1, got 1.5",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        DistillArgs(**options)


@pytest.mark.parametrize("ends", [[], [1.0], [1.0, 0.5, 0.2]])
def test_a_schedule_has_two_ends(ends):
    with pytest.raises(UserError, match=r"--distill.schedule.mix_ratio takes two numbers, .* got \["):
        ScheduleArgs(mix_ratio=ends)


@pytest.mark.parametrize("value", ["[1.0]", "0.5", "much", "[1.0, 0.5, 0.2]"])
def test_a_command_line_with_another_value(value, capsys):
    with pytest.raises(SystemExit):
        arguments_of(make_parser(), [*MODELS, "--distill.divergence", "mix", "--distill.schedule.mix_ratio", value])
    wanted = f"--distill.schedule.mix_ratio takes a list of 2 values, such as [0, 1], not '{value}'"
    assert capsys.readouterr().err == f"error: {wanted}\n"


def test_the_memory_estimate_is_of_the_largest_loss_on_the_way():
    # at skew 0 it is forward KL, and at temperature 1 no logits are copied
    args = DistillArgs(divergence="skewed_fkl", schedule=ScheduleArgs(skew=(0.0, 0.3), temperature=(2.0, 1.0)))
    found = largest_loss(args)
    assert found.working_blocks == args.loss().working_blocks > args.loss(0.0).working_blocks
    assert found.temperature > 1.0 == args.loss().temperature
    assert largest_loss(DistillArgs(temperature=2.0)) == DistillArgs(temperature=2.0).loss()


def test_command_lines_and_files(tmp_path):
    parser = make_parser()
    (tmp_path / "mix.yaml").write_text("distill: {divergence: mix, schedule: {mix_ratio: [1.0, 0.5]}}\n")
    lines = (
        ["--distill.divergence", "mix", "--distill.schedule.mix_ratio", "[1.0, 0.5]"],
        ["--distill.divergence", "mix", "--distill.schedule", "{mix_ratio: [1.0, 0.5]}"],
        ["--config", str(tmp_path / "mix.yaml")],
    )
    found = [arguments_of(parser, [*MODELS, *line]) for line in lines]
    wanted = DistillArgs(divergence="mix", schedule=ScheduleArgs(mix_ratio=(1.0, 0.5)))
    assert [given["distill"] for given in found] == [wanted] * 3
    recipe, without = (recipe_as_yaml(given) for given in (found[0], arguments_of(parser, MODELS)))
    assert "distill.schedule.mix_ratio None -> [1.0, 0.5]" in differences(without, recipe)
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert arguments_of(parser, ["--config", str(tmp_path / "recipe.yaml")])["distill"] == wanted


def test_a_run_on_a_schedule_resumes_exactly_and_tells_its_values(student_dir, teacher_dir, short, tmp_path, capsys):
    schedule = ScheduleArgs(mix_ratio=(1.0, 0.4), temperature=(2.0, 1.0))
    options = {"train": {"max_steps": 4, "save_interval": 2}, "distill": {"divergence": "mix", "schedule": schedule}}
    whole = distil(student_dir, teacher_dir, short, tmp_path / "whole", **options)
    assert "mix (mix_ratio 1 to 0.4), kd_ratio 0.5, temperature 2 to 1" in " ".join(capsys.readouterr().out.split())
    distil(student_dir, teacher_dir, short, tmp_path / "again", resume=tmp_path / "whole" / "step-000002", **options)
    assert_same(tmp_path / "whole", tmp_path / "again")
    logged = [row for row in metrics(tmp_path / "whole") if "loss" in row]
    assert [row["mix_ratio"] for row in logged] == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert [row["temperature"] for row in logged] == pytest.approx([2.0, 5 / 3, 4 / 3, 1.0])
    page = make_page([Shown(read_history(tmp_path / "whole"))])
    assert "distill.schedule" in page and "[1.0, 0.4]" in page
    # it has an effect, and validations are by the values of its end, whatever was trained with
    end = {"divergence": "mix", "mix": MixArgs(0.4)}
    other = distil(student_dir, teacher_dir, short, tmp_path / "end", **options | {"distill": end})
    assert not torch.equal(other["lm_head.weight"], whole["lm_head.weight"])
    first, of_end = (metrics(tmp_path / name)[0] for name in ("whole", "end"))
    assert first["step"] == of_end["step"] == 0 and first["val_loss"] == of_end["val_loss"]
    with pytest.raises(UserError, match=r"schedule.mix_ratio \[1.0, 0.4\] -> None"):
        distil(
            student_dir,
            teacher_dir,
            short,
            tmp_path / "other",
            resume=tmp_path / "whole" / "step-000002",
            **options | {"distill": {"divergence": "mix"}},
        )
