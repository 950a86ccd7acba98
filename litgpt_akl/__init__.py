"""Distil a large language model into a smaller one with LitGPT, by adaptive Kullback-Leibler divergence.

Importing this package imports nothing else: the start-up file loads it in every ``litgpt`` process.
"""

_MODULES = {
    "forward_kl": "litgpt_akl.loss.divergences",
    "reverse_kl": "litgpt_akl.loss.divergences",
    "adaptive_kl": "litgpt_akl.loss.divergences",
    "mixed_kl": "litgpt_akl.loss.divergences",
    "adaptive_kl_weight": "litgpt_akl.loss.divergences",
    "generalised_jsd": "litgpt_akl.loss.divergences",
    "skewed_forward_kl": "litgpt_akl.loss.divergences",
    "skewed_reverse_kl": "litgpt_akl.loss.divergences",
    "total_variation": "litgpt_akl.loss.divergences",
    "token_wise_kl": "litgpt_akl.loss.divergences",
    "alpha_beta_divergence": "litgpt_akl.loss.divergences",
    "tail_aware_kl": "litgpt_akl.loss.divergences",
    "concrete_score_divergence": "litgpt_akl.loss.divergences",
    "diversity_aware_reverse_kl": "litgpt_akl.loss.divergences",
    "DistillationLoss": "litgpt_akl.loss.distillation_loss",
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        value = version("litgpt-akl")
    elif name in _MODULES:
        from importlib import import_module

        value = getattr(import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
