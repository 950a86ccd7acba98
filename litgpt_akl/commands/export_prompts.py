"""`litgpt export_prompts`: the token ids that an inference engine is to read in the teacher's place."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from litgpt.data import DataModule

from litgpt_akl.config.args import CacheArgs
from litgpt_akl.files.directories import explain_failure, write_file
from litgpt_akl.messages import UserError, say
from litgpt_akl.training.engine_exchange import EngineExchange, prompts_of
from litgpt_akl.training.logging import silence_known_noise


def export_prompts(
    out: Path,
    *,
    teacher_checkpoint_dir: Path,
    checkpoint_dir: Path | None = None,
    data: DataModule | None = None,
    teacher: CacheArgs = CacheArgs(),
    max_seq_length: int | None = None,
    overwrite: bool = False,
    access_token: str | None = None,
) -> None:
    r"""Write the token ids of all samples that a teacher cache lacks, for an engine such as vLLM to read.

    The cache is begun if it is not there. Each line is a prompt as vLLM takes it, ``{"prompt_token_ids": [...]}``, with
    the sample's split and number beside it. What the engine writes is put into the cache by import_hidden_states.

    Example:
      litgpt export_prompts prompts.jsonl \
          --teacher_checkpoint_dir checkpoints/Qwen/Qwen3-30B-A3B \
          --checkpoint_dir checkpoints/Qwen/Qwen3-0.6B --teacher.cache_dir cache \
          --data StreamingSFT --data.path records.jsonl --data.mask_prompt true

    Args:
        out: The file to write, such as ``prompts.jsonl``.
        teacher_checkpoint_dir: The teacher's checkpoint directory.
        checkpoint_dir: The student's, whose tokenizer and chat template count (default: the teacher's).
        data: A class of records and its options: those of the training to come.
        teacher: Arguments of the cache. See ``litgpt_akl.config.args.CacheArgs`` for details.
        max_seq_length: Tokens to which records are cut, as ``train.max_seq_length`` of the training to come.
        overwrite: Whether a file that is there may be replaced.
        access_token: Optional API token to access models with restrictions.
    """
    silence_known_noise()
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out} is there already.\nGive --overwrite true to replace it, or another name.")
    exchange = EngineExchange(checkpoint_dir, teacher_checkpoint_dir, data, teacher, max_seq_length, access_token)
    exchange.open()
    counts: Counter[str] = Counter()
    with explain_failure(out, "Make room, or give another name."):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, _lines(exchange, counts))
    told = " and ".join(f"{count:,} {split}" for split, count in counts.items()) or "no"
    say(
        f"{out}: the ids of {told} samples, which {exchange.caches.directory} lacks. What an engine makes of them is"
        " put there by litgpt import_hidden_states."
    )


def _lines(exchange: EngineExchange, counts: Counter[str]) -> Iterator[bytes]:
    for prompt in prompts_of(exchange):
        counts[prompt["split"]] += 1
        yield f"{json.dumps(prompt)}\n".encode()
