"""Late fusion: one attribution from the logits of several attributors.

Legend: M methods, N images, S labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

__all__ = ["fit_weights", "fused"]


def fit_weights(logits_mns: Sequence[np.ndarray], label_n: np.ndarray) -> np.ndarray:
    """One weight a method, 0 or more, that minimise the cross-entropy of softmax(sum_m w_m log p_m).

    A product of experts: weights near 0 drop a method, their sum is the temperature of the whole. M numbers can't learn
    a validation set by heart, as weights for each label could. Every label counts the same. Not in the paper.

    Args:
        logits_mns: M times float [N, S], of images that trained none of the methods.
        label_n: int64 [N].

    Returns:
        weight_m: float64 [M].
    """
    log_p_mns = np.stack([log_softmax(np.asarray(logits, np.float64), axis=1) for logits in logits_mns])
    count_s = np.bincount(label_n, minlength=log_p_mns.shape[2])
    weight_n = 1 / count_s[label_n]
    weight_n /= weight_n.sum()
    of_label_mn = log_p_mns[:, np.arange(len(label_n)), label_n]

    def cross_entropy(weight_m: np.ndarray) -> tuple[float, np.ndarray]:
        total_ns = np.tensordot(weight_m, log_p_mns, 1)
        log_q_ns = log_softmax(total_ns, axis=1)
        loss = -float(weight_n @ log_q_ns[np.arange(len(label_n)), label_n])
        expected_mn = (log_p_mns * softmax(total_ns, axis=1)).sum(axis=2)
        return loss, (expected_mn - of_label_mn) @ weight_n

    start_m = np.full(len(log_p_mns), 1 / len(log_p_mns))
    found = minimize(cross_entropy, start_m, jac=True, bounds=[(0, None)] * len(start_m), method="L-BFGS-B")
    return np.asarray(found.x, np.float64)


def fused(logits_mns: Sequence[np.ndarray], weight_m: np.ndarray) -> np.ndarray:
    """float64 [N, S]: logits of the fusion."""
    log_p_mns = np.stack([log_softmax(np.asarray(logits, np.float64), axis=1) for logits in logits_mns])
    return np.asarray(np.tensordot(weight_m, log_p_mns, 1))
