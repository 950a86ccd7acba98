"""`litgpt import_hidden_states`: what an inference engine made of exported prompts, put into a teacher cache."""

from pathlib import Path

from litgpt.data import DataModule

from litgpt_akl.config.args import CacheArgs
from litgpt_akl.messages import UserError, say
from litgpt_akl.teacher.engine_files import EngineFiles
from litgpt_akl.training.engine_exchange import EngineExchange, Imported, import_states
from litgpt_akl.training.logging import silence_known_noise


def import_hidden_states(
    source: Path,
    *,
    teacher_checkpoint_dir: Path,
    checkpoint_dir: Path | None = None,
    data: DataModule | None = None,
    teacher: CacheArgs = CacheArgs(),
    max_seq_length: int | None = None,
    normed: bool = False,
    layer: int = -1,
    access_token: str | None = None,
) -> None:
    r"""Fill a teacher cache with hidden states that an inference engine wrote, so that the teacher is never loaded.

    Files are found by their token ids: their names and their order mean nothing, and what is of no sample is left
    alone. The teacher's final norm is applied, and its LM head is kept in the cache. The same command goes on with more
    files.

    Example:
      litgpt import_hidden_states hidden_states/ \
          --teacher_checkpoint_dir checkpoints/Qwen/Qwen3-30B-A3B \
          --checkpoint_dir checkpoints/Qwen/Qwen3-0.6B --teacher.cache_dir cache \
          --data StreamingSFT --data.path records.jsonl --data.mask_prompt true

    Args:
        source: The folder of safetensors files, one for each prompt: ``token_ids`` [tokens], and ``hidden_states``
            [tokens, layers, width] or [tokens, width], as vLLM's extract_hidden_states writes them.
        teacher_checkpoint_dir: The teacher's checkpoint directory, of which the final norm and the LM head are read.
        checkpoint_dir: The student's, whose tokenizer and chat template count (default: the teacher's).
        data: A class of records and its options: those that the prompts were exported with.
        teacher: Arguments of the cache. See ``litgpt_akl.config.args.CacheArgs`` for details.
        max_seq_length: Tokens to which records are cut, as ``train.max_seq_length`` of the training to come.
        normed: Whether the final norm has been applied to the states already. vLLM's last layer is before it.
        layer: Which of the layers in a file is the model's last one, counted from 0 (default: the file's last).
        access_token: Optional API token to access models with restrictions.
    """
    silence_known_noise()
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{source}, given as source, is no folder.\nGive the one that the engine wrote its files to.")
    exchange = EngineExchange(checkpoint_dir, teacher_checkpoint_dir, data, teacher, max_seq_length, access_token)
    files = EngineFiles(source, exchange.pair.teacher_config.n_embd, layer)
    exchange.open()
    _tell(exchange, files, import_states(exchange, files, normed))


def _tell(exchange: EngineExchange, files: EngineFiles, found: Imported) -> None:
    directory = exchange.caches.directory
    say(f"{directory}: the hidden states of {found.records:,} samples from {files.count:,} files.")
    unused = files.count - files.twice - found.records
    for count, what in ((files.twice, "have the ids of another one"), (unused, "are of no sample that was lacking")):
        if count:
            say(f"{count:,} of the files {what}.")
    lacking = [f"{count:,} {name} samples" for name, count in found.lacking.items() if count]
    if lacking:
        say(f"It lacks {' and '.join(lacking)}: litgpt export_prompts writes their ids.")
    else:
        say(f"It has all samples: train with --teacher.cache_dir {directory} --teacher.cache_mode read")
