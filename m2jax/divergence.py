"""How far a model is from a reference on the same tokens. NumPy only.

Figures and names follow llama.cpp's `llama-perplexity --kl-divergence`.
"""

from typing import Any, NamedTuple

import numpy as np

KL_QUANTILES = (0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.01)
SHIFT_QUANTILES = (0.99, 0.95, 0.75, 0.25, 0.05, 0.01)


class TokenFigures(NamedTuple):
    """One entry a token.

    kl: nats, of the reference to the model. logprob, reference_logprob: of the token
    that came. same_top: whether both find the same token likeliest.
    """

    kl: np.ndarray
    logprob: np.ndarray
    reference_logprob: np.ndarray
    same_top: np.ndarray


def compare_logits(
    logits: np.ndarray, reference: np.ndarray, targets: np.ndarray
) -> TokenFigures:
    """Figures of [T, V] logits and [T] tokens that came, in float64."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    q, p = log_softmax(logits), log_softmax(reference)
    rows = np.arange(len(targets))
    return TokenFigures(
        kl=(np.exp(p) * (p - q)).sum(axis=-1),
        logprob=q[rows, targets],
        reference_logprob=p[rows, targets],
        same_top=q.argmax(axis=-1) == p.argmax(axis=-1),
    )


class Divergence:
    """Gathers token figures, a window of text at a time."""

    def __init__(self) -> None:
        self._parts: list[TokenFigures] = []

    def add(self, figures: Any) -> None:
        """Notes a window's figures: the fields of `TokenFigures`, each [T]."""
        self._parts.append(
            TokenFigures(
                *(np.asarray(getattr(figures, name)) for name in TokenFigures._fields)
            )
        )

    def all(self) -> TokenFigures:
        """The figures of every token so far.

        Raises:
            ValueError: there is none.
        """
        if not self._parts:
            raise ValueError("no tokens were compared")
        return TokenFigures(*map(np.concatenate, zip(*self._parts)))

    def worst(self, count: int) -> list[dict[str, Any]]:
        """Tokens with the largest KL: place among all tokens, KL, both log p."""
        figures = self.all()
        places = np.argsort(-figures.kl, kind="stable")[:count]
        return [
            {
                "token": int(place),
                "kl": float(figures.kl[place]),
                "logprob": float(figures.logprob[place]),
                "reference_logprob": float(figures.reference_logprob[place]),
            }
            for place in places
        ]

    def summary(self) -> dict[str, Any]:
        """Means with standard errors, and quantiles.

        kl_*: nats. probability_shift_*: p(token) of the model minus the reference's.
        nll_ratio: mean difference of NLL, that is ln(PPL / PPL of the reference).
        """
        figures = self.all()
        kl = figures.kl.astype(np.float64)
        nll = -figures.logprob.astype(np.float64)
        reference = -figures.reference_logprob.astype(np.float64)
        shift = np.exp(-nll) - np.exp(-reference)
        same = figures.same_top.astype(np.float64)
        return {
            "tokens": len(kl),
            "kl_mean": float(kl.mean()),
            "kl_error": _error(kl),
            "kl_max": float(kl.max()),
            "kl_quantiles": _quantiles(kl, KL_QUANTILES),
            "same_top_share": float(same.mean()),
            "same_top_error": _error(same),
            "reference_nll_per_token": float(reference.mean()),
            "nll_ratio": float((nll - reference).mean()),
            "nll_ratio_error": _error(nll - reference),
            "probability_shift_mean": float(shift.mean()),
            "probability_shift_rms": float(np.sqrt(np.mean(shift**2))),
            "probability_shift_quantiles": _quantiles(shift, SHIFT_QUANTILES),
        }


def _error(values: np.ndarray) -> float | None:
    """Standard error of the mean; None of a single value."""
    if len(values) < 2:
        return None
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _quantiles(values: np.ndarray, shares: tuple[float, ...]) -> dict[str, float]:
    found = np.quantile(values, shares)
    return {f"{100 * share:g}": float(value) for share, value in zip(shares, found)}
