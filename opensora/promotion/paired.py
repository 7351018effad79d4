"""An interval for a mean difference between two models on the same prompts and seeds."""

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
SUBSETS = 9_999  # drawn; with the whole sample 10,000, of which a tail of 2.5 % is a whole number
SEED = 0


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Bounds between which the mean difference lies with a confidence of 95 %.

    They are the values of the mean that a test which flips the signs of the differences does not reject, and are found
    without trying any: the test rejects a mean below m exactly when few of the means over random subsets of the prompts
    are below m (Hartigan 1969, "Using subsample values as typical values"). Under "the two models do not differ" the
    test is exact for any distribution of scores, because the two scores of a prompt may then be exchanged. A bootstrap
    is not: it calls four prompts won of 48 and none lost an improvement (the test: one in 16 by chance) and needs only
    two prompts to be sure of anything. The subsets are drawn with a fixed seed: the same scores give the same bounds.

    Args:
        differences: candidate minus champion, a value a prompt; finite.

    Returns:
        Lower and upper bound; infinite where there are too few prompts to say anything, which is below six.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError("differences must be finite numbers, one a prompt")
    chosen = np.random.default_rng(SEED).random((SUBSETS, len(values))) < 0.5
    sizes = chosen.sum(axis=1)
    means = chosen @ values / np.maximum(sizes, 1)
    tail = round((1 - LEVEL) / 2 * (SUBSETS + 1))
    # The empty subset, no sign flipped, speaks for neither bound.
    low = np.partition(np.where(sizes > 0, means, -np.inf), tail - 1)[tail - 1]
    high = -np.partition(-np.where(sizes > 0, means, np.inf), tail - 1)[tail - 1]
    return float(low), float(high)
