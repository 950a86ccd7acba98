"""From a data module, whichever it is, to a store of training samples and one of validation samples."""

from pathlib import Path

from litgpt.args import TrainArgs
from litgpt.data import DataModule, LitData, MicroLlama, OpenWebText, TextFiles, TinyLlama, TinyStories
from litgpt.tokenizer import Tokenizer

from litgpt_akl.data.chunks import open_chunks
from litgpt_akl.data.litgpt_modules import tokenise
from litgpt_akl.data.stores import Store
from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.errors import UserError

FOR_PRETRAINING = (MicroLlama, OpenWebText, TextFiles, TinyLlama, TinyStories)


def prepare_stores(
    data: DataModule, tokenizer: Tokenizer, train: TrainArgs, context_length: int, checkpoint_dir: Path
) -> tuple[Store, Store]:
    """A data module's training and validation samples, tokenised.

    Args:
        data: a :class:`StreamingSFT`, one of LitGPT's data modules for finetuning, or its LitData.
        tokenizer: the student's.
        train: LitGPT's ``TrainArgs``; ``micro_batch_size`` and ``max_seq_length`` are used.
        context_length: tokens that both models can read.
        checkpoint_dir: the student's, for its chat template and its prompt style.

    Raises:
        UserError: unreadable data, a bad record, a sample that is too long, no training samples. The message names file
            and line where there is one.
    """
    if isinstance(data, FOR_PRETRAINING):
        raise UserError(
            f"--data {type(data).__name__} is made for pretraining: it has no prompts and responses.\n"
            "Choose StreamingSFT, one of LitGPT's finetuning modules such as JSON, or LitData for chunks of your own."
        )
    if isinstance(data, LitData):
        return open_chunks(data, train.max_seq_length or context_length)
    data.connect(tokenizer=tokenizer, batch_size=train.micro_batch_size, max_seq_length=train.max_seq_length)
    if isinstance(data, StreamingSFT):
        return data.prepare(checkpoint_dir, context_length)
    return tokenise(data, train.max_seq_length, context_length)
