"""Runs in which the student answers prompts itself."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import lightning as L
import materials
import numpy as np
import pytest
import torch
from helpers.cache_runs import assert_equal
from helpers.ranks import in_processes
from helpers.runs import alice, distil, metrics, train_args
from litgpt.data import Alpaca, LitData, TextFiles
from litgpt.generate.base import generate as litgpt_generate
from litgpt.model import GPT
from litgpt.prompts import Default
from litgpt.tokenizer import Tokenizer
from litgpt.utils import load_checkpoint, save_config

from litgpt_akl.commands.evaluate_akl import evaluate_akl
from litgpt_akl.commands.finetune_akl import setup
from litgpt_akl.config.args import GenerationArgs, LoRAArgs, TeacherArgs
from litgpt_akl.config.distillation import DistillArgs
from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.data.steps import StepBatches, StepSampler
from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.loss.distillation_loss import DistillationLoss
from litgpt_akl.messages import UserError
from litgpt_akl.models.generation import stop_sequences
from litgpt_akl.models.gpt import build_model, load_frozen
from litgpt_akl.models.weights import open_weights, read_config
from litgpt_akl.training.on_policy import OnPolicySamples, check_prompts

OWN = {"on_policy": 0.5, "on_policy_tokens": 12, "kd_ratio": 0.7}
# with AdamW's own eps of 1e-8, a rounding of a gradient near zero becomes a hundredth of a step on some processors
RATE = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-4, "eps": 1e-6}}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}


def run(student: Path, teacher_dir: Path | None, data, out_dir: Path, **changes) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    train = {"max_steps": 4, "global_batch_size": 7, "micro_batch_size": 2, **changes.pop("train", {})}
    distill = OWN | changes.pop("distill", {})
    return distil(student, teacher_dir, data, out_dir, train=train, distill=distill, **({"optimizer": RATE} | changes))


@pytest.fixture
def step_batches(teacher_dir, alice_json) -> StepBatches:
    dataset = prepare_datasets(alice(alice_json), Tokenizer(teacher_dir), train_args(), 128, teacher_dir)[0]
    plan = StepSampler(len(dataset), 8, seed=3, lengths=dataset.lengths)
    return StepBatches(dataset, plan, micro_batch_size=3)


@pytest.fixture
def fabric() -> L.Fabric:
    return L.Fabric(devices=1, accelerator="cpu")


def answering(fabric: L.Fabric, directory: Path, **distill) -> OnPolicySamples:
    tokenizer = Tokenizer(directory)
    return OnPolicySamples(
        fabric,
        load_frozen(fabric, directory, read_config(directory), torch.float32),
        DistillArgs(**distill),
        stop=stop_sequences(tokenizer, None),
        vocab_size=1024,
        longest=128,
        seed=5,
    )


def rows(step_batch) -> dict[tuple[int, ...], tuple[list[int], bool]]:
    """Labels of each row of a step batch, and whether they are on-policy, by all that is known before them."""
    found = {}
    for batch in step_batch.micro_batches:
        of_row = batch.positions // batch.input_ids.size(1)
        for row, ids in enumerate(batch.input_ids):
            places = batch.positions[of_row == row] % batch.input_ids.size(1)
            labels = batch.labels[of_row == row].tolist()
            assert ids[places + 1].tolist() == labels or not batch.is_on_policy
            found[tuple(ids[: places[0] + 1].tolist())] = (labels, batch.is_on_policy)
    return found


def test_own_answers_are_those_of_litgpt_greedily(fabric, step_batches, teacher_dir):
    on_policy_samples = answering(fabric, teacher_dir, on_policy=1.0, on_policy_tokens=20, on_policy_temperature=0.0)
    step_batch = on_policy_samples.share_of(step_batches)[0]
    assert not step_batch.micro_batches and step_batch.response_tokens == 0 and len(step_batch.prompts) == 8
    completed = on_policy_samples.complete(step_batch, step_batches)
    found = rows(completed)
    model, tokenizer = GPT(read_config(teacher_dir)).eval(), Tokenizer(teacher_dir)
    load_checkpoint(fabric, model, teacher_dir / "lit_model.pth")
    for prompt in step_batch.prompts.values():
        model.set_kv_cache(batch_size=1)
        longest = min(128, len(prompt) + 20)
        output = litgpt_generate(model, prompt, longest, temperature=0.0, eos_id=tokenizer.eos_id)
        assert found[tuple(prompt.tolist())] == (output[len(prompt) :].tolist(), True)
    assert completed.response_tokens == sum(len(labels) for labels, _ in found.values())
    assert completed.tokens == completed.response_tokens + sum(map(len, step_batch.prompts.values()))
    assert completed.padded_tokens == sum(batch.input_ids.numel() for batch in completed.micro_batches)


def test_a_share_of_the_prompts_is_answered_and_the_rest_is_as_recorded(fabric, step_batches, teacher_dir):
    on_policy_samples = answering(fabric, teacher_dir, on_policy=0.3, on_policy_tokens=5)
    sharing, drawn, samples = on_policy_samples.share_of(step_batches), 0, 0
    for number in range(40):
        recorded, step_batch = rows(step_batches[number]), sharing[number]
        assert list(step_batch.prompts) == list(sharing[number].prompts)
        completed = on_policy_samples.complete(step_batch, step_batches) if number < 3 else step_batch
        found = rows(completed)
        kept = {prompt for prompt in recorded if found.get(prompt) == recorded[prompt]}
        assert len(kept) + len(step_batch.prompts) == len(recorded)
        if number < 3:
            assert found.keys() == recorded.keys()
            tokens = [len(labels) for labels, _ in found.values()]
            assert completed.response_tokens == sum(tokens)
            assert all(len(found[prompt][0]) <= 5 for prompt in found.keys() - kept)
        drawn, samples = drawn + len(step_batch.prompts), samples + len(recorded)
    # five standard deviations
    assert abs(drawn / samples - 0.3) < 5 * np.sqrt(0.3 * 0.7 / samples)
    other = [list(sharing[number + step_batches.sampler.steps_per_epoch].prompts) for number in range(40)]
    assert other != [list(sharing[number].prompts) for number in range(40)]


def test_too_long_a_prompt_is_taken_as_recorded(fabric, step_batches, teacher_dir):
    on_policy_samples = answering(fabric, teacher_dir, on_policy=1.0)
    sharing = on_policy_samples.share_of(step_batches)
    lengths = [len(prompt) for number in range(30) for prompt in sharing[number].prompts.values()]
    assert len(lengths) == 240
    limit = sorted(lengths)[120]
    sharing = replace(sharing, longest_prompt=limit)
    within = [len(prompt) for number in range(30) for prompt in sharing[number].prompts.values()]
    assert sorted(within) == sorted(length for length in lengths if length <= limit)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher_dir, alice_json, tmp_path):
    before = open_weights(teacher_dir, read_config(teacher_dir))
    # AdamW would let the weights decay
    changes = {"distill": {"on_policy": 1.0, "kd_ratio": 1.0}, "optimizer": SGD}
    after = run(teacher_dir, teacher_dir, alice_json, tmp_path, **changes)
    steps = [row for row in metrics(tmp_path) if "loss" in row]
    assert len(steps) == 4 and all(row["loss"] == row["gradient_norm"] == 0 for row in steps)
    assert all(0 < row["own_answers_time"] < 1 for row in steps)
    assert_equal(after, {name: before[name] for name in after})


def test_one_step_equals_autograd_on_the_own_answers(
    fabric, step_batches, student_dir, teacher_dir, alice_json, tmp_path
):
    """The first step of SGD: kd_ratio times the divergence on what is on-policy, the whole loss on the rest, one N."""
    changes = {"train": {"max_steps": 1, "global_batch_size": 8, "max_norm": None}, "seed": 5, "optimizer": SGD}
    after = run(student_dir, teacher_dir, alice_json, tmp_path, **changes)
    on_policy_samples = answering(fabric, student_dir, **OWN)
    seeded = replace(
        step_batches, sampler=StepSampler(len(step_batches.dataset), 8, seed=5, lengths=step_batches.dataset.lengths)
    )
    found = rows(on_policy_samples.complete(on_policy_samples.share_of(seeded)[0], seeded))
    assert {is_on_policy for _, is_on_policy in found.values()} == {True, False}
    student, teacher = (whole_model(directory) for directory in (student_dir, teacher_dir))
    total, tokens = 0.0, 0
    for prompt, (labels, is_on_policy) in found.items():
        ids = torch.tensor([[*prompt, *labels[:-1]]])
        logits = student(ids)[0, len(prompt) - 1 :, :1024]
        with torch.no_grad():
            target = teacher(ids)[0, len(prompt) - 1 :, :1024]
        identity = torch.eye(1024)
        loss = DistillationLoss(kd_ratio=1.0 if is_on_policy else 0.7, compile=False)
        value = loss(logits, identity, target, identity, torch.tensor(labels)).loss
        total, tokens = total + (0.7 if is_on_policy else 1.0) * value, tokens + len(labels)
    (total / tokens).backward()
    assert metrics(tmp_path)[1]["loss"] == pytest.approx((total / tokens).item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(after[name], parameter.detach() - 0.1 * parameter.grad, rtol=1e-4, atol=1e-6)


def whole_model(directory: Path) -> GPT:
    config = read_config(directory)
    model = build_model(config, tied=True)
    model.load_state_dict(open_weights(directory, config))
    return model


@pytest.fixture(scope="module")
def undisturbed(student_dir, teacher_dir, alice_json, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("own") / "run"
    return run(student_dir, teacher_dir, alice_json, out_dir), metrics(out_dir)


def test_a_resumed_run_is_bit_identical(undisturbed, student_dir, teacher_dir, alice_json, tmp_path):
    short = {"max_steps": 4, "save_interval": 2}
    run(student_dir, teacher_dir, alice_json, tmp_path / "first", train=short)
    halfway = tmp_path / "first" / "step-000002"
    again = run(student_dir, teacher_dir, alice_json, tmp_path / "second", train=short, resume=halfway)
    assert_equal(again, undisturbed[0])


@pytest.mark.parametrize("devices", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_take_the_steps_of_one(undisturbed, student_dir, teacher_dir, alice_json, tmp_path, devices):
    in_processes(devices, run_in_processes, student_dir, teacher_dir, alice_json, tmp_path, devices)
    assert_equal(torch.load(tmp_path / "final" / "lit_model.pth"), undisturbed[0], within=1e-6)
    for first, second in zip(metrics(tmp_path), undisturbed[1], strict=True):
        if "loss" in first:
            assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
            assert first["tokens"] == second["tokens"]


def run_in_processes(student: Path, teacher: Path, data: Path, out_dir: Path, devices: int) -> None:
    run(student, teacher, data, out_dir, devices=devices)


@pytest.mark.parametrize("changes", [{"micro_batch_size": 7}, {"micro_batch_size": 1}])
def test_micro_batches_change_nothing(undisturbed, student_dir, teacher_dir, alice_json, tmp_path, changes):
    found = run(student_dir, teacher_dir, alice_json, tmp_path, train=changes)
    assert_equal(found, undisturbed[0], within=1e-6)


def test_loader_workers_change_nothing(undisturbed, student_dir, teacher_dir, alice_json, tmp_path):
    data = alice(alice_json)
    data.num_workers = 2
    assert_equal(run(student_dir, teacher_dir, data, tmp_path), undisturbed[0])


@pytest.mark.parametrize("mode", ["auto", "read"])
def test_recorded_responses_come_from_the_cache(undisturbed, student_dir, teacher_dir, alice_json, tmp_path, mode):
    cache = str(tmp_path / "cache")
    if mode == "read":
        with pytest.raises(FileNotFoundError, match="final"):
            filling = TeacherArgs(cache_dir=cache, cache_mode="fill")
            run(student_dir, teacher_dir, alice_json, tmp_path / "fill", teacher=filling)
    teacher = TeacherArgs(cache_dir=cache, cache_mode=mode)
    found = run(student_dir, teacher_dir, alice_json, tmp_path / "run", teacher=teacher)
    # a cache is filled in other micro-batches than these
    assert_equal(found, undisturbed[0], within=1e-5)


def test_lora_answers_with_its_adapters(student_dir, alice_json, tmp_path):
    lora = LoRAArgs(r=4, dropout=0.5)
    changes = {"lora": lora, "teacher": TeacherArgs(use_base=True), "train": {"max_steps": 3}}
    run(student_dir, None, alice_json, tmp_path, **changes)
    losses = [row["loss"] for row in metrics(tmp_path) if "loss" in row]
    assert len(losses) == 3 and all(np.isfinite(losses))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_policy": 1.5}, "--distill.on_policy must be from 0 to 1, got 1.5"),
        ({"on_policy": 0.5, "kd_ratio": 0.0}, "--distill.on_policy 0.5 with --distill.kd_ratio 0"),
        ({"on_policy_tokens": 5}, "--distill.on_policy_tokens 5 has no effect without on-policy samples"),
        ({"on_policy": 0.5, "on_policy_tokens": 0}, "--distill.on_policy_tokens must be at least 1, got 0"),
        ({"on_policy": 0.5, "on_policy_temperature": -1.0}, "on_policy_temperature must not be negative"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UserError, match=message):
        DistillArgs(**changes)


def test_mistakes_in_a_run(student_dir, teacher_dir, alice_json, tmp_path):
    data = alice(alice_json)
    data.mask_prompt = False
    with pytest.raises(UserError, match="needs to know what is a prompt: give --data.mask_prompt true"):
        run(student_dir, teacher_dir, data, tmp_path)
    cached = TeacherArgs(cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="a cache knows recorded responses, and none is read"):
        run(student_dir, teacher_dir, alice_json, tmp_path, teacher=cached, distill={"on_policy": 1.0})


def checked(dataset, config, *, longest=128, steps=100, steps_per_epoch=100, **distill) -> str:
    return check_prompts(
        dataset, config, DistillArgs(**distill), longest=longest, steps=steps, steps_per_epoch=steps_per_epoch
    )


@pytest.mark.parametrize(("window", "longest"), [(None, 128), (20, 128), (20, 15), (8, 128), (None, 12)])
def test_what_can_be_answered_is_counted_by_reasons(step_batches, teacher_dir, window, longest):
    dataset, config = step_batches.dataset, replace(read_config(teacher_dir), sliding_window_size=window)
    prompts = [int((sample["labels"] != -100).int().argmax()) for sample in dataset.read(range(len(dataset)))]
    assert dataset.prompt_lengths(np.arange(len(dataset))).tolist() == prompts
    limit = min(window or 128, longest - 1)
    fitting = sum(prompt <= limit for prompt in prompts)
    text = checked(dataset, config, longest=longest, on_policy=1.0)
    assert f"it can answer {fitting:,} of {len(dataset):,}" in text
    reason = "the student's sliding window of" if limit == window else f"the {longest} tokens of prompt and answer"
    words = f": {len(dataset) - fitting:,} prompts are longer than {reason}"
    assert (words in text) == (fitting < len(dataset)) and (fitting == len(dataset) or words in text)
    # as many are drawn in an epoch
    drawing = replace(step_batches, on_policy=1.0, longest_prompt=limit)
    assert sum(len(drawing[step].prompts) for step in range(step_batches.sampler.steps_per_epoch)) == fitting


def test_a_run_that_would_draw_nothing_is_refused(step_batches, teacher_dir):
    dataset, config = step_batches.dataset, read_config(teacher_dir)
    nothing = f"--distill.on_policy 0.5, but the student can answer none of {len(dataset):,} prompts: {len(dataset):,} "
    with pytest.raises(UserError, match=f"{nothing}prompts are longer than .* sliding window of 2 tokens.\n.*leave"):
        checked(dataset, replace(config, sliding_window_size=2), on_policy=0.5)
    few, enough = 0.9 / len(dataset), 1.1 / len(dataset)
    with pytest.raises(UserError, match=r"100 of 100 steps an epoch: it would be asked 0.9 of them.\nRaise on_policy"):
        checked(dataset, config, on_policy=few)
    # two epochs may draw what one does not, and a run that ends early draws less
    assert "An epoch draws 0.9 on average: some epochs draw none" in checked(dataset, config, steps=200, on_policy=few)
    assert "An epoch draws 1.1 on average" in checked(dataset, config, on_policy=enough)
    with pytest.raises(UserError, match="in 50 of 100 steps an epoch: it would be asked 0.55"):
        checked(dataset, config, steps=50, on_policy=enough)
    assert "on average" not in checked(dataset, config, on_policy=0.5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Alpaca(), "give --data.mask_prompt true.\n--data Alpaca without mask_prompt"),
        (LitData("nowhere"), "give --data StreamingSFT or another module .*\n--data LitData has .* no prompts"),
        (TextFiles(Path("nowhere")), "give --data StreamingSFT or another .*\n--data TextFiles has .* no prompts"),
        (StreamingSFT("nowhere"), "give --data.mask_prompt true.\n--data StreamingSFT without mask_prompt"),
    ],
)
def test_data_without_prompts_are_refused_before_anything_is_read(tmp_path, data, message):
    own = DistillArgs(on_policy=0.5)
    with pytest.raises(UserError, match=rf"--distill.on_policy 0.5 needs to know what is a prompt: {message}"):
        setup(tmp_path / "absent", teacher_checkpoint_dir=tmp_path / "absent", data=data, distill=own)
    with pytest.raises(UserError, match="so there is no prompt to answer.\n.*--generation.seeds"):
        evaluate_akl(tmp_path / "absent", teacher_checkpoint_dir=tmp_path / "absent", data=data)


def test_the_ways_out_are_ways_out(tmp_path):
    """What the messages above advise goes on to the checkpoint that is not there."""
    both = {"teacher_checkpoint_dir": tmp_path / "absent"}
    own = DistillArgs(on_policy=0.5)
    for data in (Alpaca(mask_prompt=True), StreamingSFT("nowhere", mask_prompt=True)):
        with pytest.raises(UserError, match="absent does not exist"):
            setup(tmp_path / "absent", data=data, distill=own, **both)
        with pytest.raises(UserError, match="absent does not exist"):
            evaluate_akl(tmp_path / "absent", data=data, **both)
    with pytest.raises(UserError, match="absent does not exist"):
        evaluate_akl(tmp_path / "absent", data=LitData("nowhere"), generation=GenerationArgs(seeds=[]), **both)


def test_a_run_says_what_it_answers(student_dir, teacher_dir, alice_json, tmp_path, capsys):
    """With a sliding window that some prompts are longer than; the same student is then evaluated."""
    student = shutil.copytree(student_dir, tmp_path / "student")
    dataset = prepare_datasets(alice(alice_json), Tokenizer(student), train_args(), 128, student)[0]
    lengths = dataset.prompt_lengths(np.arange(len(dataset)))
    # Hugging Face's class of this model knows no window
    (student / "config.json").unlink()
    config, step_batch = read_config(student), int(np.median(lengths))
    fitting = int((lengths <= step_batch).sum())
    assert 0 < fitting < len(dataset)
    save_config(replace(config, sliding_window_size=step_batch, sliding_window_indices=[1] * config.n_layer), student)
    run(student, teacher_dir, alice_json, tmp_path / "run", distill={"on_policy": 1.0}, train={"max_steps": 2})
    printed = capsys.readouterr().out
    words = f"it can answer {fitting:,} of {len(dataset):,}: {len(dataset) - fitting:,} prompts are longer"
    assert printed.count(words) == 1
    assert printed.index("it can answer") < printed.index("Step    0")
    plan = StepSampler(len(dataset), 7, seed=1337, lengths=dataset.lengths)
    answered = sum(int((lengths[plan.step(0, step)] <= step_batch).sum()) for step in range(2))
    assert f"the student has answered {answered} prompts" in printed
    generation = GenerationArgs(seeds=[1], max_new_tokens=4)
    options = {"data": alice(alice_json), "out_dir": tmp_path / "out", "generation": generation, "max_records": 40}
    options["split"] = "training"
    evaluate_akl(student, teacher_checkpoint_dir=teacher_dir, **options)
    counts = json.loads((tmp_path / "out" / "evaluation.json").read_text())["data"]
    assert counts["records"] == 40 and 0 < counts["prompts_left_out"] and 0 < counts["prompts"]
    assert f"{counts['prompts_left_out']} of {counts['prompts_left_out'] + counts['prompts']} prompts are left out" in (
        capsys.readouterr().out
    )
    save_config(replace(config, sliding_window_size=2, sliding_window_indices=[1] * config.n_layer), student)
    with pytest.raises(UserError, match="prompts are longer than the 2 tokens that .*\n.*--generation.seeds"):
        evaluate_akl(student, teacher_checkpoint_dir=teacher_dir, **options | {"out_dir": tmp_path / "other"})
    with pytest.raises(UserError, match="the student can answer none of"):
        run(student, teacher_dir, alice_json, tmp_path / "none")


@pytest.mark.parametrize("form", ["prompt", "messages"])
def test_prompts_need_no_response(student_dir, teacher_dir, alice_records, tmp_path, capfd, form):
    """What is recorded makes no difference to a student that answers every prompt itself."""
    student = shutil.copytree(student_dir, tmp_path / student_dir.name)
    config = json.loads((student / "tokenizer_config.json").read_text())
    template = "{{ bos_token }}{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    materials.write_json(student / "tokenizer_config.json", config | {"chat_template": template})

    def record(asked: dict[str, str], answered: bool) -> dict:
        if form == "prompt":
            return {"prompt": asked["instruction"]} | ({"completion": asked["output"]} if answered else {})
        messages = [{"role": "user", "content": asked["instruction"]}]
        return {"messages": [*messages, {"role": "assistant", "content": asked["output"]}] if answered else messages}

    def outcome(name: str, share: float, answered: bool, **options) -> dict[str, torch.Tensor]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record(asked, answered)) + "\n" for asked in alice_records[:8]))
        options = {"val_split_fraction": 0.0, **options}
        data = StreamingSFT(str(path), mask_prompt=True, prompt_style=Default(), num_proc=1, num_workers=0, **options)
        train = {"max_steps": 1, "global_batch_size": 8, "micro_batch_size": 4}
        distill = {"on_policy": share, "kd_ratio": 1.0} | ({"on_policy_tokens": 6} if share else {})
        return distil(student, teacher_dir, data, tmp_path / name, train=train, distill=distill)

    expected = outcome("answered", 1.0, True)
    found = outcome("alone", 1.0, False)
    assert "There are no validation samples" in capfd.readouterr().out
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
    # half of the others would be held out; what has no response never is
    outcome("held_out", 1.0, False, val_split_fraction=0.5)
    told = capfd.readouterr().out
    assert " 8 records of " in told and " 0 more held out" in told
    for share in (0.0, 0.5):
        with pytest.raises(UserError, match="refused.jsonl, line 1: has no "):
            outcome("refused", share, False)


def test_prompts_alone_are_answered_to_the_end_of_a_turn(student_dir, teacher_dir, tmp_path, capfd):
    """Which is another token than EOS, and stands in no record."""
    end = Tokenizer(student_dir).processor.id_to_token(1)
    template = "{% for m in messages %}{{ m.role + ':' + m.content + 'END' }}{% endfor %}"
    template = template.replace("END", end) + "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    for answered in (True, False):
        student = shutil.copytree(student_dir, tmp_path / str(answered) / student_dir.name)
        config = json.loads((student / "tokenizer_config.json").read_text())
        materials.write_json(student / "tokenizer_config.json", config | {"chat_template": template})
        roles = ("user", "assistant") if answered else ("user",)
        messages = [{"role": role, "content": "Alice was beginning"} for role in roles]
        path = tmp_path / f"{answered}.jsonl"
        path.write_text(f"{json.dumps({'messages': messages})}\n" * 4)
        data = StreamingSFT(str(path), mask_prompt=True, num_proc=1, num_workers=0, val_split_fraction=0.0)
        train = {"max_steps": 1, "global_batch_size": 4, "micro_batch_size": 4}
        distill = {"on_policy": 1.0, "on_policy_tokens": 6, "kd_ratio": 1.0}
        distil(student, teacher_dir, data, tmp_path / "out" / str(answered), train=train, distill=distill)
        assert f"{end} (1)" in capfd.readouterr().out
        generation = json.loads((tmp_path / "out" / str(answered) / "final" / "generation_config.json").read_text())
        assert set(generation["eos_token_id"]) == {1, 3}
