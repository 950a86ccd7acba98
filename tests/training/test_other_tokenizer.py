"""Runs whose teacher has another tokenizer than the student, with real models and records."""

import json
import shutil
from functools import partial
from pathlib import Path

import materials
import pytest
import torch
from helpers import tokenizer_kinds
from helpers.ranks import in_processes
from helpers.runs import difference, distil, gpt, metrics, rows
from helpers.tokenizer_kinds import ENDS
from litgpt.data import Alpaca

from litgpt_akl.commands.finetune_akl import setup
from litgpt_akl.config.args import LoRAArgs, TeacherArgs
from litgpt_akl.config.distillation import DistillArgs
from litgpt_akl.config.recipe import differences
from litgpt_akl.data import StreamingSFT
from litgpt_akl.data.alignment import align
from litgpt_akl.messages import UserError
from litgpt_akl.models.shared_vocabulary import NONE, partners, token_bytes
from litgpt_akl.models.tokenizer import OneBosTokenizer

OTHER = TeacherArgs(tokenizer="other")


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Forty records of letters that glassllm's tokenizer knows."""
    found = []
    for record in materials.alice_records():
        if not set('"#*()[]_0123456789') & set(record["output"]):
            found.append({name: " ".join(record[name].split()[:24]) for name in ("instruction", "output")})
    path = tmp_path_factory.mktemp("records") / "records.json"
    path.write_text(json.dumps(found[:40]))
    return path


@pytest.fixture(scope="module")
def other_student(tmp_path_factory) -> Path:
    """A random model whose tokenizer is byte-level."""
    directory = tmp_path_factory.mktemp("students") / "words"
    materials.write_student(directory, tied=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        (directory / name).unlink()
    tokenizer_kinds.write(directory, "words", 700)
    return directory


def data(records: Path, **options) -> StreamingSFT:
    return StreamingSFT(str(records), mask_prompt=True, num_workers=0, num_proc=1, val_split_fraction=0.2, **options)


def run(student: Path, teacher_dir: Path, records: Path, out_dir: Path, **changes) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    changes = {"teacher": OTHER, "seed": 3, **changes}
    return distil(student, teacher_dir, data(records), out_dir, **changes)


@pytest.fixture(scope="module")
def one(other_student, teacher_dir, records, tmp_path_factory):
    """What one process makes of the student with a live teacher."""
    out_dir = tmp_path_factory.mktemp("one") / "run"
    options = {"eval": {"max_new_tokens": 4, "interval": 2}}
    return run(other_student, teacher_dir, records, out_dir, **options), out_dir


def test_with_equal_tokenizers_it_is_the_ordinary_run_bit_for_bit(student_dir, teacher_dir, records, tmp_path, capsys):
    ordinary = run(student_dir, teacher_dir, records, tmp_path / "ordinary", teacher=TeacherArgs())
    aligned = run(student_dir, teacher_dir, records, tmp_path / "aligned")
    told = " ".join(capsys.readouterr().out.split())
    assert "100.0% are the same token for both and 0.0% lie in chunks of several" in told
    assert "the teacher gives 100.0% of its mass to ids that the student has" in told
    assert all(torch.equal(aligned[name], weight) for name, weight in ordinary.items())
    before, after = rows(tmp_path / "ordinary"), rows(tmp_path / "aligned")
    assert {row.pop("aligned") for row in after} == {row.pop("teacher_mass") for row in after} >= {"1.0"}
    assert before == after


def test_loss_of_a_first_step_against_both_models_read_by_hand(other_student, teacher_dir, records, tmp_path):
    """Forward KL at positions and binary KL of chunks, by the models' own logits and bytes."""
    distill = {"divergence": "fkl", "kd_ratio": 0.7}
    options = {"train": {"max_steps": 1, "global_batch_size": 64}, "eval": {"initial_validation": False}}
    options["teacher"] = TeacherArgs(tokenizer="other", chunk_temperature=2.0)
    run(other_student, teacher_dir, records, tmp_path / "run", distill=distill, **options)
    first = metrics(tmp_path / "run")[0]
    dataset, _ = prepared(other_student, teacher_dir, records)
    tokenizers = [OneBosTokenizer(directory) for directory in (other_student, teacher_dir)]
    models = [gpt(directory).eval() for directory in (other_student, teacher_dir)]
    known = [token_bytes(tokenizer) for tokenizer in tokenizers]
    pairs = partners(*tokenizers, [tuple(tokenizer.eos_id for tokenizer in tokenizers)])
    ids = [id for id, partner in enumerate(pairs) if partner != NONE]
    total = cross_entropy = tokens = positions = 0
    for sample in dataset.read(range(len(dataset))):
        both, texts = [], []
        for model, of, size, known_bytes in zip(models, (sample, sample["teacher"]), (700, 1024), known, strict=True):
            with torch.no_grad():
                logits = model(of["input_ids"][None])[0, :-1, :size].double()
            counted = of["labels"][1:] != -100
            both.append((logits[counted].log_softmax(-1), of["labels"][1:][counted]))
            texts.append([known_bytes[id] for id in both[-1][1].tolist()])
        (own, labels), (others, other_labels) = both
        assert texts[0][-1] != texts[1][-1]
        chunks = [*align(texts[0][:-1], texts[1][:-1]), (1, 1)]
        at = other_at = 0
        for count, other_count in chunks:
            if count == other_count == 1 and pairs[labels[at]] == other_labels[other_at]:
                p = others[other_at, pairs[ids]].log_softmax(-1)
                total += (p.exp() * (p - own[at, ids])).sum().item()
                positions += 1
            else:
                p = others[range(other_at, other_at + other_count), other_labels[other_at:][:other_count]].sum() / 2
                q = own[range(at, at + count), labels[at:][:count]].sum() / 2
                binary = p.exp() * (p - q) + (1 - p.exp()) * torch.log((1 - p.exp()) / (1 - q.exp()))
                total += 2 * binary.item()
            at, other_at = at + count, other_at + other_count
        cross_entropy -= own[range(len(labels)), labels].sum().item()
        tokens += len(labels)
    assert first["cross_entropy"] == pytest.approx(cross_entropy / tokens, rel=1e-5)
    assert first["divergence"] == pytest.approx(total / tokens, rel=1e-4)
    assert first["loss"] == pytest.approx((0.3 * cross_entropy + 0.7 * total) / tokens, rel=1e-4)
    assert first["aligned"] == pytest.approx(positions / tokens)


def prepared(student: Path, teacher: Path, records: Path):
    """The records as a run reads them."""
    from litgpt_akl.data.aligned_dataset import OtherTokenizer

    module, tokenizer = data(records), OneBosTokenizer(student)
    module.connect(tokenizer=tokenizer)
    of_teacher = OtherTokenizer(teacher, OneBosTokenizer(teacher), 1024, 128)
    return module.prepare(student, 128, teacher=of_teacher)


@pytest.mark.page
def test_what_a_run_says_and_keeps(one):
    _, out_dir = one
    steps = [row for row in metrics(out_dir) if "aligned" in row]
    assert len(steps) == 3 and all(0.3 < row[name] < 1 for row in steps for name in ("aligned", "teacher_mass"))
    assert "responses are missing: it has another tokenizer" in (out_dir / "report.html").read_text()
    assert json.loads((out_dir / "final" / "tokenizer_config.json").read_text())["eos_token"] == ENDS["words"]


def test_two_processes_and_a_cache_make_the_same_student(one, other_student, teacher_dir, records, tmp_path):
    weights, _ = one
    in_processes(2, partial(run, other_student, teacher_dir, records, tmp_path / "two", devices=2))
    two = torch.load(tmp_path / "two" / "final" / "lit_model.pth", weights_only=True)
    assert difference(weights, two) < 1e-6
    cache = TeacherArgs(tokenizer="other", cache_dir=str(tmp_path / "cache"))
    for out_dir in ("filling", "reading"):
        cached = run(other_student, teacher_dir, records, tmp_path / out_dir, teacher=cache)
        assert all(torch.equal(cached[name], weight) for name, weight in weights.items())
    # a run of another tokenizer's ids is told so
    with pytest.raises(UserError, match="was filled for something else: .+ tokenizer '.+' -> '.+'"):
        wrong = TeacherArgs(cache_dir=str(tmp_path / "cache"))
        run(other_student, other_student, records, tmp_path / "wrong", teacher=wrong)


def test_a_pair_is_refused_unless_asked_for(other_student, teacher_dir, records, tmp_path):
    with pytest.raises(UserError, match=r"differ in .+\n.+ by --teacher.tokenizer other\."):
        run(other_student, teacher_dir, records, tmp_path / "run", teacher=TeacherArgs())
    few = TeacherArgs(tokenizer="other", min_aligned=0.99)
    with pytest.raises(UserError, match=r"of the student's 700 .+ That is less than --teacher.min_aligned 0.99"):
        run(other_student, teacher_dir, records, tmp_path / "run", teacher=few)


REFUSED = {
    "--dry_run true: neither model is read": {"dry_run": True},
    "--distill.on_policy 0.5: the student's responses": {"distill": DistillArgs(on_policy=0.5)},
    "--teacher.use_base true: a student's base": {
        "teacher": TeacherArgs(tokenizer="other", use_base=True),
        "lora": LoRAArgs(r=2),
        "teacher_checkpoint_dir": None,
    },
    "--data Alpaca: its records": {"data": Alpaca(mask_prompt=True)},
    "--data.mask_prompt false: prompts": {"data": StreamingSFT("a")},
    "--data.too_long cut: both": {"data": StreamingSFT("a", mask_prompt=True, too_long="cut")},
    "--data.micro_batch_tokens: the": {"data": StreamingSFT("a", mask_prompt=True, micro_batch_tokens=99)},
    "--teacher.quantize nf4: what": {"teacher": TeacherArgs(tokenizer="other", quantize="nf4")},
    "--teacher.cache_dtype fp8: what": {"teacher": TeacherArgs(tokenizer="other", cache_dir="a", cache_dtype="fp8")},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_go_with_it_is_refused_before_anything_is_read(message):
    options = {"teacher_checkpoint_dir": Path("nowhere"), "data": StreamingSFT("a", mask_prompt=True), "teacher": OTHER}
    with pytest.raises(UserError, match=f"--teacher.tokenizer other with {message}"):
        setup(Path("nowhere"), **options | REFUSED[message])
    # without it the options go together
    with pytest.raises(UserError, match="nowhere does not exist"):
        setup(Path("nowhere"), **options)


@pytest.mark.parametrize(("name", "value"), [("min_aligned", 1.5), ("chunk_temperature", 0.5)])
def test_numbers_that_cannot_be(name, value):
    with pytest.raises(UserError, match=f"--teacher.{name} must be"):
        TeacherArgs(tokenizer="other", **{name: value})
    TeacherArgs(tokenizer="other", **{name: 1.0})


OWN_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}\n\n"
    "{% else %}{{ m.content | trim }}<|endoftext|>\n{% endif %}{% endfor %}"
)
TEACHERS_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<bos>Q {{ m.content }} A:"
    "{% else %} {{ m.content }}<eos>{% endif %}{% endfor %}"
)


def test_each_model_reads_a_chat_by_its_own_template(other_student, teacher_dir, tmp_path):
    directories = []
    for source, template in ((other_student, OWN_TEMPLATE), (teacher_dir, TEACHERS_TEMPLATE)):
        directories.append(shutil.copytree(source, tmp_path / source.name))
        (directories[-1] / "chat_template.jinja").write_text(template)
    said = ["Curious and curious.", "The Cat was gone, said Alice."]
    turns = [("user", "Who are you?"), ("assistant", said[0]), ("user", "And then?"), ("assistant", said[1])]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([chat] * 3))
    dataset, _ = prepared(*directories, path)
    (sample,) = dataset.read([0])
    tokenizers = [OneBosTokenizer(directory) for directory in directories]
    known = [token_bytes(tokenizer) for tokenizer in tokenizers]
    sides = []
    both = sample, sample["teacher"]
    for of, tokens in zip(both, known, strict=True):
        sides.append([tokens[id] for id in of["labels"][of["labels"] != -100].tolist()])
    # the space that only the teacher's template writes counts as no text
    assert b"".join(sides[0]).decode() == "".join(f"{text}<|endoftext|>" for text in said)
    assert b"".join(sides[1]).decode() == "".join(f" {text}<eos>" for text in said)
    prompts = [
        tokenizer.decode(of["input_ids"]) for tokenizer, of in zip(tokenizers, (sample, sample["teacher"]), strict=True)
    ]
    assert "User: Who are you?" in prompts[0] and "Q Who are you? A:" in prompts[1]
    at = other_at = 0
    for count, other_count in sample["chunks"].tolist():
        own, others = b"".join(sides[0][at : at + count]), b"".join(sides[1][other_at : other_at + other_count])
        assert own == others or own == others.removeprefix(b" ") or (own, others) == (b"<|endoftext|>", b"<eos>")
        at, other_at = at + count, other_at + other_count
    assert (at, other_at) == tuple(map(len, sides))
    special = tuple({tokenizer.eos_id} for tokenizer in tokenizers)
    assert dataset.ends(special) == [tuple(tokenizer.eos_id for tokenizer in tokenizers)]


def test_a_record_that_is_another_text_for_the_teacher_is_bad(other_student, teacher_dir, tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([{"instruction": "Say it", "output": 'He said "no" to it'}] * 3))
    with pytest.raises(UserError, match=r"line 1: its response reads .+ tokens and 'He said <unk>no<unk> to it' in"):
        prepared(other_student, teacher_dir, path)


def test_a_run_from_before_this_option_can_be_resumed():
    now = "teacher: {tokenizer: same, chunk_temperature: 100.0, min_aligned: 0.25}"
    assert differences("teacher: {}", now) == []
    assert differences(now, now.replace("0.25", "0.5")) == []
    assert differences("teacher: {}", now.replace("same", "other")) == ["teacher.tokenizer same -> other"]
    assert differences(now, now.replace("100", "2")) == ["teacher.chunk_temperature 100.0 -> 2.0"]
