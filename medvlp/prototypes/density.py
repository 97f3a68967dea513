"""A temperature for each cluster from how densely its rows lie (PCL, section 3.3)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: PCL's smoothing constant alpha, and the percentiles its code clips densities at.
_ALPHA, _PERCENTILES = 10.0, (10.0, 90.0)


def density_temperatures(distances: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """Temperatures with mean `temperature`, lower where rows lie close to their centroid.

    phi = (sum of the Euclidean distances to the centroid) / (n log(n + 10)); clusters with at most one row
    take the largest; clipped at the 10th and 90th percentile. (Li et al., ICLR 2021; the clipping and what
    happens to single rows are of the published code.) Where all rows lie on their centroids all are equal.

    Args:
        distances: [K] sums over each cluster's rows. counts: [K] rows.
        temperature: positive.

    Returns:
        [K] float32, positive.
    """
    sums, number = distances.double().numpy(), counts.double().numpy()
    several = number > 1
    density = np.zeros(len(number))
    density[several] = sums[several] / (number[several] * np.log(number[several] + _ALPHA))
    density[~several] = density.max()
    low, high = np.percentile(density, _PERCENTILES)
    # Clusters of identical rows would get a temperature of 0 where they are more than a tenth.
    density = density.clip(max(low, 1e-3 * high), high)
    if not density.mean() > 0:
        return torch.full((len(number),), temperature, dtype=torch.float32)
    return torch.from_numpy(temperature * density / density.mean()).float()
