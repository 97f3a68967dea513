"""Best one-to-one matching of two sets of vectors, one pair of sets for each sample."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@torch.no_grad()
def match(cost: Tensor, valid: Tensor) -> Tensor:
    """Give every valid column a row of its own so that the summed cost is least (Hungarian matching).

    The costs of the whole batch go to the host in one transfer, which waits for the device: scipy solves
    one matrix at a time (a 16 x 16 one in about 10 microseconds), and torch has no such solver.

    Args:
        cost: [B, N, M] cost of matching row n with column m. Costs that are not finite (a step in fp16 that
            overflowed and will be skipped) count as very high instead of raising.
        valid: [B, M] bool, columns to match.

    Returns:
        [B, M] int64 on the device of `cost`: the row of each column; -1 for columns that are not valid. Of
        more than N valid columns the first N are matched, the others get -1 too.
    """
    if isinstance(cost, FakeTensor):  # shapes alone, for a plan of memory
        return torch.zeros_like(valid, dtype=torch.int64)
    values = torch.nan_to_num(cost.float(), nan=1e30, posinf=1e30, neginf=-1e30)
    packed = torch.cat([values, valid[:, None].float()], 1).cpu().numpy()
    rows = np.full(valid.shape, -1, dtype=np.int64)
    for sample, matrix in enumerate(packed):
        columns = np.flatnonzero(matrix[-1])[: cost.shape[1]]
        row, column = linear_sum_assignment(matrix[:-1, columns])
        rows[sample, columns[column]] = row
    return torch.from_numpy(rows).to(cost.device)
