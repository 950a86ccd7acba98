"""The results as a figure."""

from pathlib import Path

from comparison.methods import METHODS, REFERENCE, STATIC_MIX
from comparison.results import METRICS, Results

PANELS = ("forward_kl", "reverse_kl", "agreement", "rouge_l")


def draw(path: Path, results: Results) -> None:
    """Each method's difference to AKL, a row a method and a panel a metric, with its 95 % interval as a bar.

    Filled is what excludes 0; the control, which has AKL's own mean weight, is in another colour.
    """
    from matplotlib import pyplot

    methods = [method for method in results.standings if method != REFERENCE]
    metrics = [metric for metric in PANELS if metric in results.metrics]
    size = 3.2 * len(metrics) + 2, 0.3 * len(methods) + 1.4
    figure, axes = pyplot.subplots(1, len(metrics), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        axis.axvline(0, color="tab:red", linewidth=1)
        for row, method in enumerate(methods):
            found = results.difference(method, metric)
            if found is None:
                continue
            colour = "tab:orange" if method == STATIC_MIX else "tab:blue"
            filling = colour if found.excludes_zero else "white"
            half = found.high - found.mean
            axis.errorbar(found.mean, row, xerr=half, fmt="o", color=colour, markerfacecolor=filling, capsize=3)
        axis.set_xlabel(f"{METRICS[metric].label} - that of AKL")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.2)
    axes[0, 0].set_yticks(range(len(methods)), [METHODS[method].label for method in methods])
    axes[0, 0].set_ylim(len(methods) - 0.5, -0.5)
    settings = results.settings
    figure.suptitle(
        f"{settings.pair}, {settings.steps} steps, {len(settings.seeds)} training seeds:"
        " difference to AKL with the same seed, 95 % intervals",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
