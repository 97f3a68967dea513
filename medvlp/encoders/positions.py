"""Fixed positions of patches."""

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from torch import Tensor


def sincos_positions(grid: tuple[int, int], width: int, device: torch.device | None = None) -> Tensor:
    """2-D sin-cos embeddings of the cells of a grid, row-major, in the layout of MAE's weights.

    Args:
        grid: (rows, columns). width: of the embedding, a multiple of 4. device: of the result.

    Returns:
        [rows * columns, width] float32: sine and cosine of the column, then sine and cosine of the row, at
        width / 4 frequencies from 1 to 1/10000. (Transformer positions in 2-D; MAE appendix A.1.)

    Raises:
        ValueError: a width that is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"2-D sin-cos positions need a width that is a multiple of 4, not {width}")
    rows_first = build_sincos2d_pos_embed(list(grid), width, interleave_sin_cos=True, device=device)
    # timm puts the row's half first; its `reverse_coord` would also number the cells by columns.
    return torch.cat(rows_first.chunk(2, dim=1)[::-1], dim=1)
