"""`litgpt export_hf`: a LitGPT checkpoint as Transformers, vLLM and llama.cpp's converter read models."""

from pathlib import Path

from litgpt_akl.files.lock import new_directory_locked
from litgpt_akl.messages import say
from litgpt_akl.models.export import write_export
from litgpt_akl.models.weights import find_checkpoint_dir
from litgpt_akl.training.out_dir import check_apart


def export_hf(checkpoint_dir: Path, out_dir: Path) -> None:
    """Write a LitGPT checkpoint for Hugging Face's libraries: safetensors, configurations, tokenizer, chat template.

    ``AutoModelForCausalLM.from_pretrained`` loads the directory, and so do vLLM and llama.cpp's converter. Neither
    Transformers nor a connection is needed to write it.

    Example:
      litgpt export_hf out/qwen3/final my-model

    Args:
        checkpoint_dir: The LitGPT checkpoint directory, such as ``final/`` of a run.
        out_dir: The directory to write. It must not exist yet, or be empty.
    """
    checkpoint_dir, out_dir = find_checkpoint_dir(checkpoint_dir, "model"), Path(out_dir)
    check_apart("out_dir", out_dir, {"model": checkpoint_dir})
    with new_directory_locked(out_dir):
        write_export(checkpoint_dir, out_dir)
    names = sorted(path.name for path in out_dir.iterdir())
    say(f"{out_dir}: {', '.join(names)}")
