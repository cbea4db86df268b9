"""BatchFormer's encoder: a transformer across the samples of a mini-batch (Hou, Yu and Tao, CVPR 2022)."""

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError

BATCH_MIXER = "mixer."
"""Prefix of the names of its tensors in a run with BatchFormer. A method that continues such a run discards them."""


class BatchMixer(nn.Module):
    """A transformer encoder in which the samples of a batch are the tokens: [B, D] or [B, E, D] → the same shape.

    All experts share one encoder. Features of different experts do not attend to each other.

    Args:
        dim: feature size D, also the width of the feed-forward part.
        layers: number of encoder layers (post-norm, with ReLU).
        heads: number of attention heads; 0 means 4 for D > 128, else 1.
        dropout: dropout rate of attention, feed-forward part and residual branches.
        chunks: number of parts of the batch. Samples attend only to samples of their part, as if each part were on a
            GPU of its own under `DataParallel`. A part has ⌈B / chunks⌉ samples; the last one has the rest.
        kaiming: initialise the feed-forward part and the output projection by Kaiming's normal initialisation, as the
            original does for all linear layers of its CIFAR networks. Otherwise torch's defaults are used.

    Raises:
        UserError: D is not a multiple of the number of heads, or `dropout` is not in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        layers: int = 1,
        heads: int = 0,
        dropout: float = 0.5,
        chunks: int = 1,
        kaiming: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise UserError(f"batchformer.dropout {dropout} must be at least 0 and below 1")
        heads = heads or (4 if dim > 128 else 1)
        if dim % heads:
            divisors = [number for number in range(1, heads) if dim % number == 0]
            raise UserError(
                f"batchformer.heads {heads} do not divide the {dim} numbers of a feature; try {divisors[-1]}"
            )
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, dim, dropout, batch_first=True) for _ in range(layers)
        )
        self.chunks = chunks
        if kaiming:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.kaiming_normal_(module.weight)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, features: Tensor, present: Tensor) -> Tensor:
        """Mix features across the batch.

        Args:
            features: [B, D] or [B, E, D], in any dtype.
            present: [B]; other samples do not attend to a sample with False.

        Returns:
            Features in the same shape, in the dtype of the weights.
        """
        x = features.to(self.dtype)
        x = x.unsqueeze(0) if x.ndim == 2 else x.transpose(0, 1)  # [E, B, D]
        x = x.masked_fill(~present.view(1, -1, 1), 0)  # absent samples may hold NaN, and 0 · NaN is NaN
        parts = zip(x.chunk(self.chunks, 1), present.chunk(self.chunks), strict=True)
        x = torch.cat([self._attend(part, mask) for part, mask in parts], 1)
        return x.squeeze(0) if features.ndim == 2 else x.transpose(0, 1)

    def _attend(self, x: Tensor, present: Tensor) -> Tensor:
        """Mix one part [E, S, D]; `present` is [S]. If no sample is present, all are treated as present."""
        absent = ~present & present.any()
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=absent.expand(len(x), -1))
        return x
