"""Compares how a student's layers are chosen: evenly spread, by block influence, one at a time by measured forward KL.

    python scripts/experiments/compare_depths.py   # SmolLM2-135M-Instruct on PIQA, the demo's material

The layers are those that `litgpt make_student` keeps by 48 calibration records. Of each student without any training,
forward KL to the teacher and agreement of the top-1 ids are measured on 48 other records. What is finished is kept in
--out: the same command goes on where it was interrupted. It ends with `depths.json` and `depths.md` there.
"""

import argparse
import json
from pathlib import Path

import torch
from litgpt.args import TrainArgs
from litgpt.data import JSON
from torch import Tensor

from litgpt_akl.commands.make_student import make_student
from litgpt_akl.data.data_module import prepare_datasets
from litgpt_akl.data.steps import collate
from litgpt_akl.loss.divergences import forward_kl
from litgpt_akl.messages import progress_bar, say
from litgpt_akl.models.depth import DepthSearch, even_layers, influential_layers
from litgpt_akl.models.layerwise import LayerwiseModel, Sample
from litgpt_akl.models.model_files import read_tokenizer
from litgpt_akl.models.student_checkpoint import RECORD
from litgpt_akl.models.weights import open_weights, read_config
from litgpt_akl.training.calibration import ids_in_use

METHODS = {
    "even": "evenly spread",
    "block_influence": "block influence, one pass",
    "greedy": "one at a time by forward KL",
    "last": "last layers dropped",
}


def piqa(directory: Path) -> JSON:
    return JSON(json_path=directory, mask_prompt=True, prompt_style="smollm2", num_workers=0)


def chosen_layers(records: dict[str, dict], counts: list[int]) -> dict[str, list[int]]:
    """Layers by method and count, from what make_student wrote for the smallest count, by method."""
    influence, found = torch.tensor(records["block_influence"]["block_influence"]), {}
    n_layer = len(influence)
    for count in counts:
        removed = {removal["layer"] for removal in records["greedy"]["removed"][: n_layer - count]}
        found[f"even {count}"] = even_layers(count, n_layer)
        found[f"block_influence {count}"] = influential_layers(influence, count, keep_ends=True)
        found[f"greedy {count}"] = [layer for layer in range(n_layer) if layer not in removed]
        found[f"last {count}"] = [*range(count)]
    return found


def read_held_out(data: Path, teacher: Path, records: int) -> list[Sample]:
    """The first records of the validation set."""
    config = read_config(teacher)
    train, vocab_size = TrainArgs(micro_batch_size=1), ids_in_use(teacher, config)
    known = {"teacher_dir": teacher, "vocab_size": vocab_size}
    _, held_out = prepare_datasets(piqa(data), read_tokenizer(teacher), train, config.block_size, teacher, **known)
    batches = [collate([sample]) for sample in held_out.read(range(records))]
    return [Sample(batch.input_ids[0], batch.positions, batch.labels) for batch in batches]


@torch.no_grad()
def measure(model: LayerwiseModel, student: list[Tensor], teacher: list[Tensor], ids: int) -> dict[str, float]:
    """Means over response tokens, of final hidden states ``[1, n, n_embd]`` of both."""
    sums, tokens = torch.zeros(2, dtype=torch.float64), 0
    for pair in zip(teacher, student, strict=True):
        wanted, found = (model.lm_head.logits(hidden[0])[:, :ids] for hidden in pair)
        agreeing = (wanted.argmax(dim=1) == found.argmax(dim=1)).sum()
        sums += torch.stack([forward_kl(wanted, found).sum(), agreeing]).double()
        tokens += len(wanted)
    return {"forward_kl": sums[0].item() / tokens, "agreement": sums[1].item() / tokens}


def table(results: dict[str, dict], counts: list[int]) -> str:
    """Forward KL, agreement in brackets, for people."""
    lines = [f"| layers kept | {' | '.join(METHODS.values())} |", "|---" * (1 + len(METHODS)) + "|"]
    for count in counts:
        found = [results[f"{method} {count}"] for method in METHODS]
        cells = [f"{each['forward_kl']:.3f} ({each['agreement']:.2f})" for each in found]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compare(teacher: Path, data: Path, out: Path, counts: list[int], records: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    made = {}
    for method in ("greedy", "block_influence"):
        smallest = out / method
        if not smallest.is_dir():
            make_student(teacher, smallest, layers=min(counts), data=piqa(data), records=records, method=method)
        made[method] = json.loads((smallest / RECORD).read_text())
    layers = chosen_layers(made, counts)
    path = out / "depths.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    samples, config = read_held_out(data, teacher, records), read_config(teacher)
    longest = max(len(sample.input_ids) for sample in samples)
    model = LayerwiseModel(config, open_weights(teacher, config), torch.device("cpu"), torch.float32, longest)
    ids = ids_in_use(teacher, config)
    search = DepthSearch(model, samples, ids)
    whole = search.final_hidden([*range(config.n_layer)])
    for name in progress_bar([name for name in layers if name not in results], desc="measuring", unit="student"):
        found = measure(model, search.final_hidden(layers[name]), whole, ids)
        results[name] = {**found, "layers": layers[name]}
        path.write_text(json.dumps(results, indent=1))
    (out / "depths.md").write_text(table(results, counts) + "\n")
    say(table(results, counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path(".demo"), help="what scripts/prepare_demo.py made")
    parser.add_argument("--out", type=Path, default=Path(".depths"), help="where all of it is kept (default: .depths)")
    parser.add_argument("--kept", type=int, nargs="+", default=[27, 24, 20, 15], help="how many layers to keep")
    parser.add_argument("--records", type=int, default=48, help="calibration records, and as many to measure on")
    given = parser.parse_args()
    compare(given.demo / "SmolLM2-135M-Instruct", given.demo / "piqa", given.out, given.kept, given.records)


if __name__ == "__main__":
    main()
