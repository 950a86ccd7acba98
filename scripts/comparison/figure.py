"""The results as a figure."""

from pathlib import Path

from comparison.methods import METHODS, REFERENCE, STATIC_MIX
from comparison.results import Results


def draw(path: Path, results: Results) -> None:
    """Forward KL against reverse KL, a point a method, with standard deviations over the seeds as bars."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
    colours = {REFERENCE: "tab:red", STATIC_MIX: "tab:orange"}
    for method in results.standings:
        across, up = (results.spread(method, metric) for metric in ("forward_kl", "reverse_kl"))
        if across is None or up is None:
            continue
        colour = colours.get(method, "tab:blue")
        axis.errorbar(across[0], up[0], xerr=across[1], yerr=up[1], fmt="o", color=colour, markersize=5, capsize=3)
        axis.annotate(
            METHODS[method].label,
            (across[0], up[0]),
            xytext=(6, 5),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )
    settings = results.settings
    axis.set(xscale="log", yscale="log")
    axis.set_xlabel("forward KL to the teacher, nats per response token of held-out records")
    axis.set_ylabel("reverse KL, nats")
    axis.set_title(
        f"{settings.pair}, {settings.steps} steps, {len(settings.seeds)} training seeds: mean ± standard deviation",
        fontsize=10,
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(which="both", alpha=0.2)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
