"""Small tokenizers of the kinds that models have: they cut digits, words, spaces and rare letters otherwise."""

import json
from collections.abc import Iterable
from pathlib import Path

import materials
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from litgpt_akl.models.tokenizer import OneBosTokenizer

ENDS = {"digits": "<|im_end|>", "words": "<|endoftext|>", "spaces": "</s>"}
SUMS = [f"{a} + {b} = {a + b}, and {a * b * 1000} is {a * b} thousand." for a in range(7, 900, 13) for b in (18, 125)]
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""As Llama 3 divides texts, up to case."""


def corpus() -> list[str]:
    return [*materials.alice_text().split("\n\n"), *SUMS * 8]


def train(kind: str, size: int, texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of byte-level BPE that cuts digits apart, or three together; or of SentencePiece's kind."""
    tokenizer = Tokenizer(models.BPE())
    options = {"vocab_size": size, "special_tokens": ["<unk>", ENDS[kind]], "show_progress": False}
    if kind == "spaces":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    else:
        digits = pre_tokenizers.Digits(individual_digits=True)
        first = digits if kind == "digits" else pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "digits")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, level])
        tokenizer.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**options))
    return _with_bytes(tokenizer) if kind == "spaces" else tokenizer


def _with_bytes(trained: Tokenizer) -> Tokenizer:
    """The same with a token for each byte, as Llama 2's and Gemma's, and a space before every text."""
    model = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(pieces)
    tokenizer.add_special_tokens(["<unk>", ENDS["spaces"]])
    return tokenizer


def write(directory: Path, kind: str, size: int = 600, texts: Iterable[str] | None = None) -> Path:
    """Its files, into a directory that may be that of a checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    train(kind, size, corpus() if texts is None else texts).save(str(directory / "tokenizer.json"))
    entries = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": ENDS[kind], "add_bos_token": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(entries))
    return directory


def read_all(directory: Path) -> dict[str, OneBosTokenizer]:
    """One of each kind, with glassllm's, which has a token for single letters and none for others."""
    found = {kind: OneBosTokenizer(write(directory / kind, kind, 600 + 150 * n)) for n, kind in enumerate(ENDS)}
    (directory / "letters").mkdir()
    materials.write_tokenizer(directory / "letters")
    return {**found, "letters": OneBosTokenizer(directory / "letters")}
