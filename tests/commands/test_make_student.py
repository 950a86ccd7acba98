import json
import os
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.commands import start
from helpers.runs import alice
from litgpt import Tokenizer
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from litgpt.utils import save_config
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel

from litgpt_akl.commands.make_student import make_student
from litgpt_akl.files.directories import write_directory
from litgpt_akl.messages import UserError
from litgpt_akl.models.depth import DepthSearch
from litgpt_akl.models.importance import measure_importance
from litgpt_akl.models.layerwise import LayerwiseModel
from litgpt_akl.models.model_files import copy_model_files
from litgpt_akl.models.model_size import measure_size
from litgpt_akl.models.weights import open_weights, read_config
from litgpt_akl.training.calibration import read_samples


def load_model(checkpoint_dir: Path) -> GPT:
    model = GPT(Config.from_file(checkpoint_dir / "model_config.yaml"))
    model.load_state_dict(torch.load(checkpoint_dir / "lit_model.pth", weights_only=True))
    return model.eval()


def write_gemma_teacher(directory: Path) -> None:
    """A random 6-layer Gemma 3 (5 sliding layers and a full one), whose Hugging Face config has no layer_types."""
    config = Config.from_name(
        "Gemma-3-1b-it", n_layer=6, n_embd=32, n_head=2, n_query_groups=1, head_size=16, intermediate_size=48
    )
    directory.mkdir()
    save_config(config, directory)
    torch.save(GPT(config).state_dict(), directory / "lit_model.pth")
    text_config = {"num_hidden_layers": 6, "num_attention_heads": 2, "head_dim": 16, "sliding_window_pattern": 6}
    text_config |= {"sliding_window": config.sliding_window_size, "rope_scaling": None}
    hf_config = {"model_type": "gemma3", "text_config": text_config}
    (directory / "config.json").write_text(json.dumps(hf_config))
    FastTokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')


@torch.no_grad()
@pytest.mark.parametrize(
    ("layers", "kept"), [([0, 2], [0, 2]), (2, [0, 3]), (1, [3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3]), ([3], [3])]
)
def test_student_is_the_teacher_without_the_other_layers(teacher_dir, tmp_path, layers, kept):
    make_student(teacher_dir, tmp_path / "student", layers=layers)
    pruned = load_model(teacher_dir)
    pruned.transformer.h = torch.nn.ModuleList(pruned.transformer.h[layer] for layer in kept)
    pruned.config = deepcopy(pruned.config)
    pruned.config.n_layer = len(kept)
    ids = torch.arange(4, 132).view(1, 128)
    assert torch.equal(load_model(tmp_path / "student")(ids), pruned(ids))


def test_student_is_a_complete_checkpoint(teacher_dir, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_dir, teacher)
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    (teacher / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Default\n")
    (teacher / "special_tokens_map.json").write_text("{}")
    make_student(teacher, tmp_path / "student", layers=2)
    assert sorted(os.listdir(tmp_path / "student")) == sorted([*os.listdir(teacher), "manifest.json"])
    assert sorted(os.listdir(tmp_path)) == ["student", "teacher"]
    for name in ("tokenizer.json", "chat_template.jinja", "prompt_style.yaml", "generation_config.json"):
        assert (tmp_path / "student" / name).read_bytes() == (teacher / name).read_bytes()
    config = Config.from_file(tmp_path / "student" / "model_config.yaml")
    assert (config.name, config.n_layer, config.n_embd) == ("glassllm-en", 2, 128)
    assert json.loads((tmp_path / "student" / "config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.parametrize("nested", [False, True])
def test_weights_are_flat_owned_and_as_tied_as_in_the_teacher(teacher_dir, tmp_path, nested):
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_dir, teacher)
    weights = torch.load(teacher / "lit_model.pth", weights_only=True)
    stacked = torch.stack([weights["transformer.ln_f.weight"]] * 1000)
    weights["transformer.ln_f.weight"] = stacked[7]
    torch.save({"model": weights, "step": 3} if nested else weights, teacher / "lit_model.pth")
    make_student(teacher, tmp_path / "student", layers=[0, 3])
    student = torch.load(tmp_path / "student" / "lit_model.pth", weights_only=True)
    assert student["lm_head.weight"].data_ptr() == student["transformer.wte.weight"].data_ptr()
    assert torch.equal(student["transformer.h.1.attn.qkv.weight"], weights["transformer.h.3.attn.qkv.weight"])
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in student.values())
    bytes_of_tensors = sum({tensor.data_ptr(): tensor.nbytes for tensor in student.values()}.values())
    assert (tmp_path / "student" / "lit_model.pth").stat().st_size < bytes_of_tensors + 20_000


def test_untied_head_stays_its_own(untied_student_dir, tmp_path):
    make_student(untied_student_dir, tmp_path / "student", layers=1)
    student = torch.load(tmp_path / "student" / "lit_model.pth", weights_only=True)
    assert not torch.equal(student["lm_head.weight"], student["transformer.wte.weight"])


@torch.no_grad()
def test_converted_student_gives_the_same_logits_in_transformers(teacher_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    make_student(teacher_dir, tmp_path / "student", layers=[0, 1, 3])
    convert_lit_checkpoint(tmp_path / "student", tmp_path / "converted")
    weights = torch.load(tmp_path / "converted" / "model.pth", weights_only=True)
    torch.save(weights, tmp_path / "converted" / "pytorch_model.bin")
    shutil.copy(tmp_path / "student" / "config.json", tmp_path / "converted")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    ids = torch.arange(4, 132).view(1, 128)
    assert converted.config.num_hidden_layers == 3
    assert (load_model(tmp_path / "student")(ids) - converted(ids).logits).abs().max() < 1e-4


def test_layer_lists_follow_the_kept_layers(tmp_path):
    write_gemma_teacher(tmp_path / "teacher")
    make_student(tmp_path / "teacher", tmp_path / "student", layers=[1, 5])
    config = Config.from_file(tmp_path / "student" / "model_config.yaml")
    assert (config.sliding_window_indices, config.rope_indices) == ([1, 0], [1, 0])
    text_config = json.loads((tmp_path / "student" / "config.json").read_text())["text_config"]
    assert text_config["num_hidden_layers"] == 2
    assert text_config["layer_types"] == ["sliding_attention", "full_attention"]


def test_bos_rule_of_a_folder_name_is_made_explicit(teacher_dir, tmp_path):
    llama = tmp_path / "Llama-3.2-1B"
    shutil.copytree(teacher_dir, llama)
    assert Tokenizer(llama).use_bos
    make_student(llama, tmp_path / "student", layers=2)
    assert Tokenizer(tmp_path / "student").encode("Alice").tolist() == Tokenizer(llama).encode("Alice").tolist()
    make_student(llama, tmp_path / "Llama-3-student", layers=2)
    assert Tokenizer(tmp_path / "Llama-3-student").use_bos
    with pytest.raises(UserError, match="In a folder named Llama-3-other LitGPT puts a BOS token"):
        make_student(teacher_dir, tmp_path / "Llama-3-other", layers=2)
    assert sorted(os.listdir(tmp_path)) == ["Llama-3-student", "Llama-3.2-1B", "student"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (0, "layers is 0, but the teacher has 4 layers"),
        (5, "layers is 5, but the teacher has 4 layers"),
        ([], "layers is empty"),
        ([0, 4], r"layers names \[4\], but the teacher's 4 layers are numbered 0 to 3"),
        ([-1, 2], r"layers names \[-1\]"),
        ([2, 0], r"not rising, or a layer twice. Give \[0, 2\]"),
        ([0, 2, 2], r"not rising, or a layer twice. Give \[0, 2\]"),
    ],
)
def test_wrong_layers_are_refused(teacher_dir, tmp_path, layers, message):
    with pytest.raises(UserError, match=message):
        make_student(teacher_dir, tmp_path / "student", layers=layers)
    assert os.listdir(tmp_path) == []


def test_wrong_directories_are_refused(teacher_dir, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    cases = [
        (tmp_path / "absent", tmp_path / "student", "absent does not exist"),
        (
            tmp_path / "full",
            tmp_path / "student",
            "lacks lit_model.pth, model_config.yaml, tokenizer_config.json, tokenizer.json or",
        ),
        (teacher_dir, teacher_dir, "is the teacher's own directory"),
        (teacher_dir, tmp_path / "full", "is not empty"),
        (teacher_dir, tmp_path / "file", "is a file"),
        (teacher_dir, tmp_path / "file" / "student", "cannot be written"),
    ]
    for teacher, out_dir, message in cases:
        with pytest.raises(UserError, match=message):
            make_student(teacher, out_dir, layers=2)
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]


def test_wrong_weights_are_refused(teacher_dir, student_dir, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_dir, teacher)
    whole = (teacher / "lit_model.pth").read_bytes()
    weights = torch.load(teacher / "lit_model.pth", weights_only=True)
    del weights["transformer.h.2.norm_1.weight"]
    for content, message in [
        (whole[: len(whole) // 2], rf"\({len(whole) // 2:,} bytes\) cannot be read as weights"),
        (b"", r"\(0 bytes\) cannot be read as weights"),
        ({"optimizer": {}}, "lacks 31 of 31 tensors"),
        (weights, r"lacks 1 of 31 tensors \['transformer.h.2.norm_1.weight'\]"),
        (weights | {"transformer.h.0.attn.qkv.lora_A": torch.ones(1)}, "litgpt merge_lora"),
    ]:
        if isinstance(content, bytes):
            (teacher / "lit_model.pth").write_bytes(content)
        else:
            torch.save(content, teacher / "lit_model.pth")
        with pytest.raises(UserError, match=message):
            make_student(teacher, tmp_path / "student", layers=2)
    (teacher / "lit_model.pth").write_bytes(whole)
    shutil.copy(student_dir / "model_config.yaml", teacher)
    with pytest.raises(UserError, match="is of another model: num_hidden_layers is 4, and .* says 2, and 3"):
        make_student(teacher, tmp_path / "student", layers=2)
    (teacher / "config.json").unlink()
    with pytest.raises(UserError, match="does not fit its model_config.yaml"):
        make_student(teacher, tmp_path / "student", layers=2)
    assert os.listdir(tmp_path) == ["teacher"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_directory_leaves_the_old_one(tmp_path, error):
    with write_directory(tmp_path / "out") as directory:
        (directory / "value").write_text("old")
    with pytest.raises(error), write_directory(tmp_path / "out") as directory:
        (directory / "value").write_text("new")
        raise error
    assert (tmp_path / "out" / "value").read_text() == "old"
    with write_directory(tmp_path / "out") as directory:
        (directory / "other").write_text("new")
        assert os.listdir(tmp_path / "out") == ["value"]
    assert os.listdir(tmp_path / "out") == ["other"]
    assert os.listdir(tmp_path) == ["out"]


def test_leftovers_of_a_killed_process_are_cleared(tmp_path):
    (tmp_path / ".out.partial" / "out").mkdir(parents=True)
    (tmp_path / ".out.previous").mkdir()
    (tmp_path / ".out.previous" / "value").write_text("old")
    with pytest.raises(OSError), write_directory(tmp_path / "out") as directory:
        assert os.listdir(directory) == []
        raise OSError
    assert (tmp_path / "out" / "value").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_copies_are_writable_and_need_no_tokenizer_config(tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    copy.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer.json").chmod(0o444)
    copy_model_files(source, copy)
    assert os.listdir(copy) == ["tokenizer.json"]
    assert (copy / "tokenizer.json").stat().st_mode & 0o200


@pytest.mark.parametrize(("kl_records", "keep_ends"), [(3, True), (5, False)])
def test_layers_are_chosen_by_forward_kl_on_the_data(teacher_dir, alice_json, tmp_path, capsys, kl_records, keep_ends):
    options = {"records": 7, "kl_records": kl_records, "keep_ends": keep_ends}
    make_student(teacher_dir, tmp_path / "student", layers=2, data=alice(alice_json), **options)
    record = json.loads((tmp_path / "student" / "make_student.json").read_text())
    config, directory = read_config(teacher_dir), teacher_dir
    samples = read_samples(alice(alice_json), directory, config, 7, None)
    model = LayerwiseModel(config, open_weights(directory, config), torch.device("cpu"), torch.float32, 128)
    some = [samples[number] for number in {3: (0, 3, 6), 5: (0, 2, 3, 4, 6)}[kl_records]]
    removals = DepthSearch(model, some, 1024).remove(2, keep_ends)
    assert record["removed"] == [removal._asdict() for removal in removals]
    kept = sorted({0, 1, 2, 3} - {removal.layer for removal in removals})
    assert record["kept"] == kept and (kept == [0, 3] or not keep_ends)
    # no part was scored, since that is not what layers are removed by
    assert "block_influence" not in record
    assert (record["method"], record["records"], record["kl_records"]) == ("greedy", 7, kl_records)
    said = capsys.readouterr().out
    assert said.startswith(f"{teacher_dir}: choosing 2 of 4 layers (greedy).")
    assert f"Forward KL to the teacher on these records: {removals[-1].forward_kl:.3f} nats" in said
    make_student(teacher_dir, tmp_path / "named", layers=kept)
    assert (tmp_path / "student" / "lit_model.pth").read_bytes() == (tmp_path / "named" / "lit_model.pth").read_bytes()


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_layers_are_chosen_by_block_influence(teacher_dir, alice_json, tmp_path, precision):
    options = {"data": alice(alice_json), "records": 5, "precision": precision, "max_seq_length": 60}
    make_student(teacher_dir, tmp_path / "student", layers=3, method="block_influence", **options)
    record = json.loads((tmp_path / "student" / "make_student.json").read_text())
    influence = record["block_influence"]
    assert record["kept"] == sorted({0, 1, 2, 3} - {min((1, 2), key=influence.__getitem__)})
    assert record["tokens"] <= 5 * 60
    exact = LayerwiseModel(
        read_config(teacher_dir),
        open_weights(teacher_dir, read_config(teacher_dir)),
        torch.device("cpu"),
        torch.float32,
        60,
    )
    samples = read_samples(alice(alice_json), teacher_dir, exact.config, 5, 60)
    difference = (measure_importance(exact, samples).blocks - torch.tensor(influence)).abs().max()
    assert difference < 1e-6 if precision == "32-true" else 1e-6 < difference < 1e-2


@pytest.mark.slow  # four commands
def test_the_documented_way_in_two_steps_works(teacher_dir, alice_records, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "teachers.md").read_text()
    (block,) = re.findall(r"prune again\n.*?```bash\n(.*?)```", page, re.DOTALL)
    lines = block.replace("\\\n", " ").replace("TEACHER_DIR", str(teacher_dir)).splitlines()
    records = ({"prompt": each["instruction"], "completion": each["output"]} for each in alice_records)
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    less = {"make_student": "--records 6 --trial_steps 2", "finetune_akl": "--train.max_steps 2 --train.epochs null"}
    for line in lines:
        words = [*line.split()[1:], *less[line.split()[1]].split()]
        assert start(words, tmp_path / "log", directory=tmp_path).wait(200) == 0, (tmp_path / "log").read_text()
    assert len(lines) == 4 and (tmp_path / "out" / "second" / "final" / "lit_model.pth").is_file()
    sizes = [
        measure_size(read_config(directory), True).whole
        for directory in (teacher_dir, tmp_path / "first", tmp_path / "second")
    ]
    assert sizes[1] <= 0.65 * sizes[0] and sizes[2] <= 0.6 * sizes[1]


def test_few_records_are_all_read(teacher_dir, short, tmp_path, capsys):
    make_student(teacher_dir, tmp_path / "student", layers=3, data=short, records=50)
    assert "--records 50: the data has 40." in capsys.readouterr().out
    assert json.loads((tmp_path / "student" / "make_student.json").read_text())["records"] == 40


@pytest.mark.parametrize(("params", "layers"), [(1, 4), (0.8, 3), (0.5, 1), (600_000, 2), (1e9, 4)])
def test_layers_fit_a_number_of_parameters(teacher_dir, tmp_path, params, layers):
    make_student(teacher_dir, tmp_path / "student", params=params)
    config = Config.from_file(tmp_path / "student" / "model_config.yaml")
    assert config.n_layer == layers
    sizes = [measure_size(replace(config, n_layer=number), True).whole for number in (layers, layers + 1, 4)]
    budget = params * sizes[2] if params <= 1 else params
    assert sizes[0] <= budget and (layers == 4 or budget < sizes[1])


def test_options_that_have_no_effect_are_refused(teacher_dir, short, tmp_path):
    data = {"data": short}
    cases = [
        ({}, "How much of the teacher to keep is not told"),
        ({"layers": 2, "params": 0.5}, "--layers 2 and --params 0.5 both tell the depth"),
        ({"params": 0}, "--params must be above 0, got 0"),
        ({"params": 0.3}, "--params 0.3 are .*Give --params 0.37 or more"),
        ({"layers": 2, "method": "greedy"}, "--method greedy is decided by calibration records, .* or leave it out"),
        ({"layers": 2, "width": 0.5}, "--width 0.5 is decided by calibration records"),
        ({"layers": [0, 2], "method": "greedy", **data}, r"--method greedy has no effect with --layers \[0, 2\]"),
        ({"layers": [0, 2], **data}, r"--data has no effect with --layers \[0, 2\]"),
        ({"layers": 2, "method": "even", **data}, "--data has no effect with --method even"),
        ({"layers": 2, "records": 9}, "--records 9 has no effect where no calibration records are read"),
        ({"layers": 2, "precision": "32-true"}, "--precision 32-true has no effect"),
        ({"layers": 2, "keep_ends": False}, "--keep_ends false has no effect"),
        ({"layers": 2, "records": 0, **data}, "--records must be at least 1, got 0"),
        ({"layers": 1, **data}, "Give a number of 2 to 4. The first and the last stay unless --keep_ends is false"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=re.compile(message, re.DOTALL)) as raised:
            make_student(teacher_dir, tmp_path / "student", **options)
        assert len(str(raised.value).splitlines()) <= 2
    assert os.listdir(tmp_path) == ["short"]
    # the ways out
    make_student(teacher_dir, tmp_path / "small", params=0.37)
    make_student(teacher_dir, tmp_path / "one", layers=1, keep_ends=False, records=3, **data)
