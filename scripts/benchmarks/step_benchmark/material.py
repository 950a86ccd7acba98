"""The two pairs of models and the rows of each step, in a folder of their own; what is there already is left alone."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import prepare_demo
import torch
from litgpt.args import TrainArgs
from litgpt.config import Config
from litgpt.data import JSON
from litgpt.model import GPT
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from litgpt.utils import save_config

from litgpt_akl.commands.make_student import make_student
from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.steps import StepSampler
from litgpt_akl.files.directories import write_directory
from litgpt_akl.models.pair import check_pair
from step_benchmark.job import ROWS, SEED, Job

WIDE_LAYERS = 8
WIDE_TOKENS = 151_665
"""Ids of Qwen2.5's tokenizer; the rest of the 151,936 only pad the head."""
WIDE_CONFIDENCE = 6.0
"""Standard deviation of the made teacher's logits, with which a handful of ids hold half of its mass."""


def prepare_jobs(pairs: Sequence[str], demo: Path, out: Path, warmup: int, steps: int) -> dict[str, Path]:
    """Each pair's job file."""
    # standard output is for the tables
    with redirect_stdout(sys.stderr):
        prepare_demo.prepare_demo(demo)
        return {pair: prepare_job(pair, demo, out, warmup, steps) for pair in pairs}


def prepare_job(pair: str, demo: Path, out: Path, warmup: int, steps: int) -> Path:
    teacher = demo / prepare_demo.MODEL_NAME
    if pair == "wide":
        teacher = made(out / pair / "teacher", lambda directory: make_wide_teacher(directory, demo))
    student = out / pair / "student"
    if not student.is_dir():
        make_student(teacher, student, layers=Config.from_file(teacher / "model_config.yaml").n_layer // 2)
    models = {"teacher": teacher, "student": student}
    exported = {
        role: made(out / pair / f"hf_{role}", lambda d, m=model: export(m, d)) for role, model in models.items()
    }
    folder = made(
        out / pair / f"{warmup}+{steps}-steps",
        lambda directory: write_rows(directory, student, teacher, demo / "piqa", ROWS * (warmup + steps)),
    )
    rows = json.loads((folder / "rows.json").read_text())
    job = Job(
        pair=pair,
        **{role: str(model.resolve()) for role, model in models.items()},
        **{f"hf_{role}": str(directory.resolve()) for role, directory in exported.items()},
        records=str((folder / "records").resolve()),
        ordered_records=str((folder / "ordered").resolve()),
        logits=str((folder / "logits.pth").resolve()),
        warmup=warmup,
        steps=[rows[start : start + ROWS] for start in range(0, len(rows), ROWS)],
    )
    job.write(folder / "job.json")
    return folder / "job.json"


def made(directory: Path, write: Callable[[Path], None]) -> Path:
    if not directory.is_dir():
        with write_directory(directory) as partial:
            write(partial)
    return directory


def make_wide_teacher(directory: Path, demo: Path) -> None:
    """Random weights in the shapes of Qwen2.5-0.5B, fewer layers, with SmolLM2's tokenizer widened to as many ids."""
    config = Config.from_name("Qwen2.5-0.5B", n_layer=WIDE_LAYERS)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(config)
    weights = {name: torch.empty(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        tensor.normal_(std=0.02) if tensor.ndim == 2 else tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    weights["transformer.ln_f.weight"].fill_(WIDE_CONFIDENCE / (0.02 * config.n_embd**0.5))
    torch.save(weights, directory / "lit_model.pth")
    save_config(config, directory)
    source = demo / prepare_demo.MODEL_NAME
    for name in ("generation_config.json", "tokenizer_config.json"):
        shutil.copy(source / name, directory)
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.update({f"<unused {number}>": number for number in range(len(vocabulary), WIDE_TOKENS)})
    prepare_demo.write_json(directory / "tokenizer.json", tokenizer)
    prepare_demo.write_json(directory / "config.json", qwen_config(config))


def qwen_config(config: Config) -> dict:
    """What Transformers needs to know of a Qwen2.5 model."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_query_groups,
        "hidden_act": "silu",
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_theta": config.rope_base, "rope_type": "default"},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


def export(model: Path, directory: Path) -> None:
    """The same weights as Transformers reads them."""
    convert_lit_checkpoint(model, directory)
    (directory / "model.pth").rename(directory / "pytorch_model.bin")
    for path in model.glob("*.json"):
        shutil.copy(path, directory)


def write_rows(directory: Path, student: Path, teacher: Path, piqa: Path, count: int) -> None:
    """``count`` records of PIQA, as a run over all of it would put them together, and the logits of the first."""
    records = json.loads((piqa / "train.json").read_text(encoding="utf-8"))
    chosen = [records[number] for number in order(read_store(piqa, student, teacher), count)]
    few = json.loads((piqa / "val.json").read_text(encoding="utf-8"))[:ROWS]
    write_records(directory / "records", chosen, few)
    dataset = read_store(directory / "records", student, teacher)
    numbers = order(dataset, count)
    write_records(directory / "ordered", [chosen[number] for number in numbers], few)
    samples = [dataset.read([number])[0] for number in numbers]
    rows = [{name: sample[name].tolist() for name in ("input_ids", "labels")} for sample in samples]
    (directory / "rows.json").write_text(json.dumps(rows))
    models = {"student": student, "teacher": teacher}
    logits = {role: logits_of(model, rows[0]["input_ids"]) for role, model in models.items()}
    torch.save(logits, directory / "logits.pth")


def read_store(path: Path, student: Path, teacher: Path) -> TokenizedDataset:
    data = JSON(json_path=path, mask_prompt=True, prompt_style="smollm2", num_workers=0)
    pair = check_pair(student, teacher)
    return prepare_datasets(data, pair.tokenizer, TrainArgs(micro_batch_size=ROWS), pair.context_length, student)[0]


def order(dataset: TokenizedDataset, count: int) -> list[int]:
    """The numbers of the first ``count`` samples that a run takes."""
    plan = StepSampler(len(dataset), ROWS, SEED, dataset.lengths)
    return [int(number) for step in range(count // ROWS) for number in plan.step(0, step)]


def write_records(directory: Path, train: list[dict], validation: list[dict]) -> None:
    directory.mkdir()
    prepare_demo.write_json(directory / "train.json", train)
    prepare_demo.write_json(directory / "val.json", validation)


@torch.inference_mode()
def logits_of(directory: Path, ids: list[int]) -> torch.Tensor:
    with torch.device("meta"):
        model = GPT(Config.from_file(directory / "model_config.yaml"))
    model.load_state_dict(torch.load(directory / "lit_model.pth", weights_only=True), assign=True)
    model.cos, model.sin = model.rope_cache()
    return model.eval()(torch.tensor([ids]))[0].clone()
