"""Real tiny material for tests and quick scripts, fetched once with pip: a small English model and a book."""

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import save_config
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>")
BLOCK_SIZE = 128

TEACHER_CONFIG = Config(
    name="glassllm-en",
    block_size=BLOCK_SIZE,
    vocab_size=1024,
    padded_vocab_size=1024,
    n_layer=4,
    n_head=4,
    n_embd=128,
    n_query_groups=2,
    rotary_percentage=1.0,
    parallel_residual=False,
    bias=False,
    norm_class_name="RMSNorm",
    norm_eps=1e-6,
    mlp_class_name="LLaMAMLP",
    intermediate_size=341,
)
STUDENT_CONFIG = replace(
    TEACHER_CONFIG, name="glassllm-student", n_layer=2, n_embd=64, head_size=16, intermediate_size=170
)


def cache_dir() -> Path:
    """Where downloads are kept: LITGPT_AKL_TEST_CACHE, or litgpt-akl-tests in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "litgpt-akl-tests"
    directory = Path(os.environ.get("LITGPT_AKL_TEST_CACHE", default))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def download(requirement: str, file_name: str, *options: str) -> Path:
    """The path of a file of the package index, downloaded unless it is cached; RuntimeError if pip cannot get it."""
    path = cache_dir() / file_name
    if path.is_file():
        return path
    with tempfile.TemporaryDirectory(dir=cache_dir()) as directory:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", directory, *options, requirement]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if not (Path(directory) / file_name).is_file():
            raise RuntimeError(
                f"{file_name} from the package index is needed, and pip could not download it:\n"
                f"{' '.join(command)}\n{finished.stderr.strip()}\n"
                f"Put the file into {cache_dir()} by hand, or set LITGPT_AKL_TEST_CACHE to a directory that has it."
            )
        os.replace(Path(directory) / file_name, path)
    return path


def glassllm_package() -> Path:
    """The directory to put on sys.path for `import glassllm`; it also holds the weights."""
    wheel = download("glassllm==0.1.0", "glassllm-0.1.0-py3-none-any.whl")
    directory = cache_dir() / "glassllm-0.1.0"
    if not directory.is_dir():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as partial, zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(partial) / "whole")
            os.rename(Path(partial) / "whole", directory)
    return directory


def write_teacher(out_dir: Path) -> None:
    """Writes glassllm's English model as a LitGPT checkpoint with a Hugging Face config.json; the head is tied."""
    weights = glassllm_weights(glassllm_package() / "glassllm" / "weights" / "en.npz")
    write_checkpoint(out_dir, TEACHER_CONFIG, weights, tied=True)


def write_student(out_dir: Path, *, tied: bool, seed: int = 0) -> None:
    """Writes a 2-layer model with random weights (normal, standard deviation 0.02) and the teacher's tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(STUDENT_CONFIG)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    write_checkpoint(out_dir, STUDENT_CONFIG, model.state_dict(), tied=tied)


def write_checkpoint(out_dir: Path, config: Config, weights: dict[str, torch.Tensor], tied: bool) -> None:
    out_dir.mkdir(parents=True)
    torch.save(weights, out_dir / "lit_model.pth")
    save_config(config, out_dir)
    write_tokenizer(out_dir)
    hf_config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.n_embd,
        "head_dim": config.head_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.block_size,
        "num_attention_heads": config.n_head,
        "num_hidden_layers": config.n_layer,
        "num_key_value_heads": config.n_query_groups,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": float(config.rope_base),
        "tie_word_embeddings": tied,
        "vocab_size": config.padded_vocab_size,
        "bos_token_id": SPECIAL_TOKENS.index("<bos>"),
        "eos_token_id": SPECIAL_TOKENS.index("<eos>"),
    }
    write_json(out_dir / "config.json", hf_config)
    write_json(out_dir / "generation_config.json", {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0})


def glassllm_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads glassllm's arrays, stored as [in, out], under LitGPT's names; wte and lm_head share their storage."""
    arrays = {name: torch.from_numpy(array) for name, array in numpy.load(path).items() if array.dtype.kind == "f"}
    arrays = {name: tensor.float().t().contiguous() for name, tensor in arrays.items()}
    embeddings = arrays["E"].t().contiguous()
    weights = {
        "lm_head.weight": embeddings,
        "transformer.wte.weight": embeddings,
        "transformer.ln_f.weight": arrays["norm_f.gamma"],
    }
    for layer in range(TEACHER_CONFIG.n_layer):
        source, target = f"blocks.{layer}", f"transformer.h.{layer}"
        query, key = (halves_from_pairs(arrays[f"{source}.attn.{name}"]) for name in ("W_Q", "W_K"))
        weights |= {
            f"{target}.norm_1.weight": arrays[f"{source}.norm1.gamma"],
            f"{target}.attn.qkv.weight": torch.cat((query, key, arrays[f"{source}.attn.W_V"])),
            f"{target}.attn.proj.weight": arrays[f"{source}.attn.W_O"],
            f"{target}.norm_2.weight": arrays[f"{source}.norm2.gamma"],
            f"{target}.mlp.fc_1.weight": arrays[f"{source}.ffn.W1"],
            f"{target}.mlp.fc_2.weight": arrays[f"{source}.ffn.W3"],
            f"{target}.mlp.proj.weight": arrays[f"{source}.ffn.W2"],
        }
    return weights


def halves_from_pairs(weight: torch.Tensor) -> torch.Tensor:
    """Reorders each head's rows: glassllm's RoPE rotates rows (0, 1), (2, 3), ...; LitGPT's the two halves."""
    return weight.view(-1, TEACHER_CONFIG.head_size // 2, 2, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def write_tokenizer(out_dir: Path) -> None:
    """Writes glassllm's character BPE as tokenizer.json. The model was trained without <bos> and <eos>."""
    path = glassllm_package() / "glassllm" / "weights" / "en.tokenizer.json"
    source = json.loads(path.read_text(encoding="utf-8"))
    merges = [tuple(pair) for pair in source["merges"]]
    tokens = [*SPECIAL_TOKENS, *source["alphabet"], *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(out_dir / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "model_max_length": BLOCK_SIZE,
        **{f"{token.strip('<>')}_token": token for token in SPECIAL_TOKENS},
    }
    write_json(out_dir / "tokenizer_config.json", tokenizer_config)


def alice_text() -> str:
    """Alice's Adventures in Wonderland (148 kB), from the test data of the Brotli sources."""
    sdist = download("Brotli==1.1.0", "Brotli-1.1.0.tar.gz", "--no-binary", "Brotli")
    with tarfile.open(sdist) as archive:
        text = archive.extractfile("Brotli-1.1.0/tests/testdata/alice29.txt").read().decode("ascii")
    # the tokenizer knows no backtick
    return text.replace("\r\n", "\n").replace("`", "‘").replace("'", "’")


def alice_records() -> list[dict[str, str]]:
    """240 paragraphs of the book: the first four words are the instruction, at most 40 more the output.

    With `litgpt.prompts.Default` (the bare instruction) every record fits into 128 tokens.
    """
    paragraphs = (paragraph.split() for paragraph in re.split(r"\n\s*\n", alice_text()))
    long_enough = [words for words in paragraphs if len(words) >= 12][:240]
    return [
        {"instruction": " ".join(words[:4]), "input": "", "output": " " + " ".join(words[4:44])}
        for words in long_enough
    ]


def alice_passages() -> list[dict[str, str]]:
    """The whole book in 601 passages of 44 words: the first four are the instruction, the rest the output."""
    words = alice_text().split()
    passages = (words[start : start + 44] for start in range(0, len(words) - 43, 44))
    return [{"instruction": " ".join(some[:4]), "input": "", "output": " " + " ".join(some[4:])} for some in passages]


def write_alice_json(out_dir: Path) -> None:
    """Writes train.json and val.json for `litgpt.data.JSON`: every sixth record is for validation."""
    out_dir.mkdir(parents=True)
    records = alice_records()
    write_json(out_dir / "train.json", [record for number, record in enumerate(records) if number % 6])
    write_json(out_dir / "val.json", records[::6])


def write_json(path: Path, content: dict | list) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
