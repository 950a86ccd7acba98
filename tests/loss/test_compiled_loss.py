"""The compiled loss at two values of every option, one after the other, against the eager loss.

Both follow each other in one process, and, the other way round, in a second process on the first one's cache. This file
needs little, so that it runs on a machine with a GPU and not much else:

    python -m pytest -s --noconftest tests/loss/test_compiled_loss.py -k cuda
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from loss_benchmark.option_pairs import SETS, draw_inputs, relative_differences

from litgpt_akl.loss.distillation_loss import DistillationLoss


def measure(device: str, backwards: bool) -> None:
    """Print, as JSON, the new graphs and the largest relative difference to eager results for each of SETS."""
    inputs, rows, counters = draw_inputs(device), [], torch._dynamo.utils.counters
    for name, sets in SETS:
        for options in reversed(sets) if backwards else sets:
            before = counters["stats"]["unique_graphs"]
            differences = relative_differences(inputs, name, options)
            rows.append((name, options, counters["stats"]["unique_graphs"] - before, differences))
    hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    print(json.dumps({"rows": rows, "hits": hits}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_every_option_at_two_values_in_two_processes_on_one_cache(device, tmp_path):
    assert DistillationLoss(compile=True).compiles_on(device), "the tests need a compiler (apt-get install g++)"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "error:torch.compile"}
    found = {}
    for process in ("first", "second"):
        code = f"import test_compiled_loss; test_compiled_loss.measure({device!r}, {process == 'second'})"
        folders = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
        finished = subprocess.run(
            [sys.executable, "-c", code], env=environment | {"PYTHONPATH": folders}, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stderr
        found[process] = json.loads(finished.stdout.splitlines()[-1])
        print(f"\n{device}, {process} process, {found[process]['hits']} cache hits")
        print("objective    graphs  loss     divergence  gradients")
        for name, options, graphs, differences in found[process]["rows"]:
            print(f"{name:<12} {graphs:<7}", *(f"{difference:.1e} " for difference in differences), options)
    assert found["second"]["hits"] > found["first"]["hits"], "the second process did not use the first one's cache"
    rows = [row for process in found.values() for row in process["rows"]]
    assert [row for row in rows if not all(difference < 1e-5 for difference in row[3])] == []
    assert [row[2] for row in rows[1::2]] == [0] * (len(rows) // 2), "code was made anew for another value"
