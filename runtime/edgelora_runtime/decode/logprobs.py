"""Log probabilities of tokens under the model's own distribution.

They are taken before temperature, filters and constraints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelora_runtime.answers.generation import TokenLogprob
from edgelora_runtime.decode.sampling import take_largest

if TYPE_CHECKING:
    from numpy.typing import NDArray


def rate_token(logits: NDArray[np.float32], token: int, count: int) -> TokenLogprob:
    """Returns the log probability of a token and of the `count` likeliest.

    logits: of shape (V,). Computed in float64.
    """
    values = logits.astype(np.float64)
    largest = values.max()
    total = largest + np.log(np.exp(values - largest).sum())
    top = tuple((int(each), float(values[each] - total)) for each in take_largest(logits, count))
    return TokenLogprob(token, float(values[token] - total), top)
