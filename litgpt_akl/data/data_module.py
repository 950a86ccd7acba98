"""From a data module, whichever it is, to a dataset of training samples and one of validation samples."""

from pathlib import Path

from litgpt.args import TrainArgs
from litgpt.data import DataModule, LitData
from litgpt.tokenizer import Tokenizer

from litgpt_akl.config.checks import FOR_PRETRAINING
from litgpt_akl.data.aligned_dataset import OtherTokenizer
from litgpt_akl.data.dataset import TokenizedDataset
from litgpt_akl.data.litdata import open_chunks
from litgpt_akl.data.litgpt_modules import SFTSettings, open_module
from litgpt_akl.data.preparation import RowsOf, prepare
from litgpt_akl.data.streaming import StreamingSFT
from litgpt_akl.loss.distillation_loss import IGNORE_INDEX
from litgpt_akl.messages import UserError
from litgpt_akl.models.tokenizer import token_map


def prepare_datasets(
    data: DataModule,
    tokenizer: Tokenizer,
    train: TrainArgs,
    context_length: int,
    checkpoint_dir: Path,
    cut_by: str = "--train.max_seq_length",
    date: str | None = None,
    teacher_dir: Path | None = None,
    vocab_size: int | None = None,
    prompts_alone: bool = False,
    rows_of: RowsOf = prepare,
    teacher: OtherTokenizer | None = None,
) -> tuple[TokenizedDataset, TokenizedDataset]:
    """A data module's training and validation samples, tokenised.

    Args:
        data: a :class:`StreamingSFT`, one of LitGPT's data modules for finetuning, or its LitData.
        tokenizer: the student's.
        train: of it, ``micro_batch_size`` and ``max_seq_length`` are used.
        context_length: tokens that both models can read.
        checkpoint_dir: the student's, for its chat template and its prompt style.
        cut_by: the command's option for ``max_seq_length``, for messages.
        date: the day that the student's chat template is to write, if it writes one (default: the present one).
        teacher_dir: the teacher's, for its chat template if that is chosen.
        vocab_size: ids that the models know (default: all of the tokenizer); records with others are bad.
        prompts_alone: whether training records of a :class:`StreamingSFT` may have no response: a student gives it.
        rows_of: what makes rows of records that are read from files.
        teacher: if it has another tokenizer, which only a :class:`StreamingSFT` can be read with.

    Raises UserError for unreadable data, a bad record, a sample that is too long, or no training samples, with file and
    line where there is one.
    """
    if isinstance(data, FOR_PRETRAINING):
        raise UserError(
            f"--data {type(data).__name__} is made for pretraining: it has no prompts and responses.\n"
            "Choose StreamingSFT, one of LitGPT's finetuning modules such as JSON, or LitData for chunks of your own."
        )
    ignored = getattr(data, "ignore_index", IGNORE_INDEX)
    if ignored != IGNORE_INDEX:
        raise UserError(
            f"--data.ignore_index {ignored} is not supported: what does not count is {IGNORE_INDEX} here; remove it."
        )
    vocab_size = vocab_size or max(token_map(tokenizer)) + 1
    if isinstance(data, LitData):
        return open_chunks(data, train.max_seq_length or context_length, cut_by, vocab_size)
    data.connect(tokenizer=tokenizer, batch_size=train.micro_batch_size, max_seq_length=train.max_seq_length)
    if isinstance(data, StreamingSFT):
        options = cut_by, date, teacher_dir, vocab_size, prompts_alone, rows_of, teacher
        return data.prepare(checkpoint_dir, context_length, *options)
    style = getattr(data, "prompt_style", None)
    options = train.max_seq_length, context_length, "stop", cut_by, vocab_size
    return open_module(data, SFTSettings(checkpoint_dir, tokenizer, style, *options), rows_of)
