"""A served teacher: its hidden states, written by an engine that nobody here wrote, train as the live one does."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.cache_runs import RATE, TRAIN
from helpers.families import write_family
from helpers.marks import few_or_many, with_all_slow_but
from helpers.runs import difference, distil, gpt, metrics, short_data
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from litgpt_akl.commands.export_prompts import export_prompts
from litgpt_akl.commands.import_hidden_states import import_hidden_states
from litgpt_akl.config.args import CacheArgs, TeacherArgs
from litgpt_akl.loss.top_k import TopK
from litgpt_akl.messages import UserError
from litgpt_akl.models.export import write_export
from litgpt_akl.teacher.engine_files import EngineFiles


@pytest.fixture
def short(alice_json, tmp_path):
    return short_data(alice_json, tmp_path / "short")


@pytest.fixture
def place(tmp_path, teacher_dir, student_dir) -> dict:
    """The options that both commands share."""
    cache = CacheArgs(cache_dir=str(tmp_path / "cache"))
    return {"teacher_checkpoint_dir": teacher_dir, "checkpoint_dir": student_dir, "teacher": cache}


def prompts_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def serve(teacher: Path, prompts: list[dict], out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Let Transformers read prompts, and write what vLLM writes: some layers' states, the last before the norm."""
    exported = out.with_name(f"{out.name}-model")
    if not exported.exists():
        write_export(teacher, exported)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=dtype, attn_implementation="eager").eval()
    norm = next(module for name, module in model.named_modules() if name in ("model.norm", "gpt_neox.final_layer_norm"))
    seen = []
    norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    out.mkdir(exist_ok=True)
    for number, prompt in enumerate(prompts, start=len([*out.iterdir()])):
        ids = torch.tensor([prompt["prompt_token_ids"]])
        first = model(ids, output_hidden_states=True).hidden_states[1][0]
        states = torch.stack([first, seen.pop()[0]], dim=1).contiguous()
        # the names say nothing of the order
        name = f"request-{number * 7919 % 100_003}.safetensors"
        save_file({"hidden_states": states, "token_ids": ids[0]}, out / name)


def train(student: Path, teacher: Path, data, out_dir: Path, **teacher_options) -> dict:
    args = TeacherArgs(**teacher_options)
    return distil(student, teacher, data, out_dir, train=TRAIN, teacher=args, optimizer=RATE)


def without_weights(teacher: Path, directory: Path) -> Path:
    return shutil.copytree(teacher, directory, ignore=shutil.ignore_patterns("lit_model.pth"))


def test_a_served_teacher_trains_as_the_live_one(place, short, tmp_path, teacher_dir, student_dir, capsys):
    export_prompts(tmp_path / "prompts.jsonl", data=short, **place)
    prompts = prompts_in(tmp_path / "prompts.jsonl")
    assert [prompt["split"] for prompt in prompts] == ["training"] * 40 + ["validation"] * 7
    serve(teacher_dir, prompts[:30], tmp_path / "states")
    import_hidden_states(tmp_path / "states", data=short, **place)
    told = capsys.readouterr().out
    assert "the hidden states of 30 samples from 30 files" in told
    assert "It lacks 10 training samples and 7 validation samples: litgpt export_prompts" in told
    # only what is lacking is asked for, and the same command goes on with it
    export_prompts(tmp_path / "rest.jsonl", data=short, **place)
    assert prompts_in(tmp_path / "rest.jsonl") == prompts[30:]
    serve(teacher_dir, prompts[30:], tmp_path / "states")
    import_hidden_states(tmp_path / "states", data=short, **place)
    told = capsys.readouterr().out
    assert "the hidden states of 17 samples from 47 files" in told and "It has all samples" in told
    lone = without_weights(teacher_dir, tmp_path / "lone" / teacher_dir.name)
    cached = train(
        student_dir, lone, short, tmp_path / "cached", cache_dir=place["teacher"].cache_dir, cache_mode="read"
    )
    live = train(student_dir, teacher_dir, short, tmp_path / "live")
    start = torch.load(student_dir / "lit_model.pth", weights_only=True)
    assert difference(live, cached) < 1e-5 < difference(live, start) / 10
    found = [[row["val_loss"] for row in metrics(tmp_path / name) if "val_loss" in row] for name in ("live", "cached")]
    assert found[0] == pytest.approx(found[1], rel=1e-5) and len(found[0]) == 2
    few = CacheArgs(cache_dir=str(tmp_path / "few"), cache_dtype="topk:8")
    import_hidden_states(tmp_path / "states", data=short, **place | {"teacher": few})
    assert_few_of(Path(few.cache_dir), Path(place["teacher"].cache_dir))


def assert_few_of(few: Path, whole: Path) -> None:
    """The one cache has of each token the most probable ids, as the hidden states in the other one have them."""
    (head,) = (load_file(path) for path in whole.glob("head-*"))
    layout = TopK(8, json.loads((few / "cache.json").read_text())["vocab_size"])
    rows, states = map(records_in, (few, whole))
    assert rows.keys() == states.keys() and len(rows) == 40 and not list(few.glob("head-*"))
    for number, of in rows.items():
        logits = (states[number] @ head["lm_head.weight"].T)[:, : layout.vocab_size]
        wanted, found = logits.log_softmax(-1).topk(8), layout.unpack(of, torch.float32)
        assert torch.equal(wanted.indices, found.ids)
        torch.testing.assert_close(found.log_p[:, :8], wanted.values, rtol=1e-3, atol=1e-3)


def records_in(cache: Path) -> dict[int, torch.Tensor]:
    """What a cache has of each training sample, by number."""
    found = {}
    for chunk in map(load_file, (cache / "training").iterdir()):
        for number, _, start, tokens, _ in chunk["index"].tolist():
            found[number] = chunk["hidden"][start : start + tokens]
    return found


@pytest.mark.parametrize("family", with_all_slow_but((), ("Qwen3-30B-A3B", "Gemma-2-2b", "pythia-14m")))
def test_teachers_of_other_families(place, short, tmp_path, student_dir, teacher_dir, family):
    """Among them a mixture of experts, for a dense student; in bfloat16, as engines compute."""
    teacher = tmp_path / "teachers" / family
    write_family(family, teacher, tied=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(teacher_dir / name, teacher / name)
    cache = CacheArgs(cache_dir=place["teacher"].cache_dir, precision="bf16-true")
    place |= {"teacher_checkpoint_dir": teacher, "teacher": cache}
    export_prompts(tmp_path / "prompts.jsonl", data=short, **place)
    serve(teacher, prompts_in(tmp_path / "prompts.jsonl"), tmp_path / "states", torch.bfloat16)
    import_hidden_states(tmp_path / "states", data=short, **place)
    options = {"precision": "bf16-true", "cache_mode": "read", "cache_dir": cache.cache_dir}
    train(student_dir, without_weights(teacher, tmp_path / "lone" / family), short, tmp_path / "cached", **options)
    train(student_dir, teacher, short, tmp_path / "live", precision="bf16-true")
    found = [[row["val_loss"] for row in metrics(tmp_path / name) if "val_loss" in row] for name in ("live", "cached")]
    assert found[0] == pytest.approx(found[1], rel=0.01) and len(found[0]) == 2


@pytest.mark.parametrize("count", few_or_many("LITGPT_AKL_IMPORTED", 400, 10_000))
def test_no_record_gets_the_states_of_another(tmp_path, count):
    """Shuffled files, of which some are truncated, shifted, of a changed id, or there twice."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    records = [torch.randint(0, 50, (length,), generator=generator) for length in lengths]
    of = {tuple(ids.tolist()): number for number, ids in enumerate(records)}
    damages = ["none", "none", "truncated", "shifted", "changed", "twice"]
    names = torch.randperm(2 * count, generator=generator).tolist()
    whole = set()
    for number, ids in enumerate(records):
        damage = damages[number % len(damages)]
        written = {"truncated": ids[:-1], "shifted": ids.roll(1), "changed": (ids + (ids == ids[0])) % 50}.get(
            damage, ids
        )
        owner = of.get(tuple(written.tolist()))
        owner = count if owner is None else owner
        states = torch.stack([torch.full((len(written),), owner), torch.arange(len(written))], dim=1).float()
        for turn in range(2 if damage == "twice" else 1):
            save_file(
                {"token_ids": written, "hidden_states": states}, tmp_path / f"{names[2 * number + turn]}.safetensors"
            )
        whole.add(owner)
    files, wrong, found = EngineFiles(tmp_path, 2, -1), 0, set()
    for ids in records:
        file, number = files.find(ids), of[tuple(ids.tolist())]
        if file is not None:
            positions = torch.arange(len(ids) - 1)
            states = files.read(file, ids, positions)
            wrong += not torch.equal(
                states, torch.stack([torch.full_like(positions, number), positions], dim=1).float()
            )
            found.add(number)
    assert wrong == 0 and found == whole - {count} and len(found) >= count / 2


@pytest.fixture
def served(place, short, tmp_path, teacher_dir) -> Path:
    export_prompts(tmp_path / "prompts.jsonl", data=short, **place)
    serve(teacher_dir, prompts_in(tmp_path / "prompts.jsonl")[:8], tmp_path / "states")
    return tmp_path / "states"


def rewrite(directory: Path, change) -> None:
    for path in directory.glob("*.safetensors"):
        save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


@pytest.mark.parametrize(("shift", "told"), [(1, "moved back by one id"), (-1, "moved on by one id")])
def test_states_of_the_ids_beside_their_own_are_refused(served, place, short, shift, told, capsys):
    rewrite(served, lambda tensors: tensors | {"hidden_states": tensors["hidden_states"].roll(shift, 0)})
    found = rf"have \d+\.\d\d nats a token, and \d+\.\d\d {told}\.\nWrite them anew"
    with pytest.raises(UserError, match=found):
        import_hidden_states(served, data=short, **place)
    # the way out
    rewrite(served, lambda tensors: tensors | {"hidden_states": tensors["hidden_states"].roll(-shift, 0)})
    capsys.readouterr()
    import_hidden_states(served, data=short, **place)
    assert "the hidden states of 8 samples from 8 files" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["Llama-3.2-1B", "Gemma-2-2b", "pythia-14m"])
@torch.no_grad()
def test_states_that_a_norm_has_made_are_told_from_others(place, short, tmp_path, teacher_dir, family, capsys):
    """Of norms with and without bias and unit offset."""
    teacher = tmp_path / "teachers" / family
    write_family(family, teacher, tied=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(teacher_dir / name, teacher / name)
    place |= {"teacher_checkpoint_dir": teacher}
    export_prompts(tmp_path / "prompts.jsonl", data=short, **place)
    serve(teacher, prompts_in(tmp_path / "prompts.jsonl")[:4], tmp_path / "states")
    with pytest.raises(UserError, match="are not what the teacher's final norm makes.\nLeave out --normed true"):
        import_hidden_states(tmp_path / "states", data=short, normed=True, **place)
    norm = gpt(teacher).transformer.ln_f
    rewrite(tmp_path / "states", lambda tensors: tensors | {"hidden_states": norm(tensors["hidden_states"][:, -1])})
    with pytest.raises(UserError, match="are already what the teacher's final norm makes.\nGive --normed true"):
        import_hidden_states(tmp_path / "states", data=short, **place)
    capsys.readouterr()
    import_hidden_states(tmp_path / "states", data=short, normed=True, **place)
    assert "the hidden states of 4 samples from 4 files" in capsys.readouterr().out


def first_of(directory: Path) -> Path:
    return min(directory.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read as safetensors"),
        (lambda path: path.write_bytes(b"not one"), "cannot be read as safetensors"),
        (lambda path: save_file({"ids": torch.zeros(3)}, path), "has the tensors ids, and not token_ids"),
        (
            lambda path: save_file(cut(path, 1), path),
            r"token_ids has the shape \[\d+\] and hidden_states \[\d+, 2, \d+\]",
        ),
        (lambda path: save_file(narrow(path), path), r"the teacher needs \[tokens\] and \[tokens, layers, \d+\]"),
        (lambda path: save_file(not_finite(path), path), "hidden states that are not finite"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_of_it_is_kept(served, place, short, change, named, capsys):
    path = first_of(served)
    change(path)
    with pytest.raises(UserError, match=named) as told:
        import_hidden_states(served, data=short, **place)
    assert str(path) in str(told.value) and str(told.value).count("\n") == 1
    # the way out: without it the rest goes in
    path.unlink()
    capsys.readouterr()
    import_hidden_states(served, data=short, **place)
    assert "from 7 files" in capsys.readouterr().out


def cut(path: Path, rows: int) -> dict:
    tensors = load_file(path)
    return tensors | {"hidden_states": tensors["hidden_states"][rows:].contiguous()}


def narrow(path: Path) -> dict:
    tensors = load_file(path)
    return tensors | {"hidden_states": tensors["hidden_states"][..., :-1].contiguous()}


def not_finite(path: Path) -> dict:
    tensors = load_file(path)
    tensors["hidden_states"][:] = float("nan")
    return tensors


def test_wrong_places_are_refused(served, place, short, tmp_path):
    with pytest.raises(UserError, match="holds only files named \\*.jsonl"):
        (tmp_path / "other").mkdir()
        shutil.copy(tmp_path / "prompts.jsonl", tmp_path / "other")
        import_hidden_states(tmp_path / "other", data=short, **place)
    with pytest.raises(UserError, match="--layer 2 is not among the 2 layers"):
        import_hidden_states(served, data=short, layer=2, **place)
    before = (tmp_path / "prompts.jsonl").read_text()
    with pytest.raises(UserError, match="is there already.\nGive --overwrite true"):
        export_prompts(tmp_path / "prompts.jsonl", data=short, **place)
    export_prompts(tmp_path / "prompts.jsonl", data=short, overwrite=True, **place)
    assert (tmp_path / "prompts.jsonl").read_text() == before
