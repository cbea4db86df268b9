"""BatchFormer's encoder: a transformer across the samples of a mini-batch (Hou, Yu and Tao, CVPR 2022)."""

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError

BATCH_MIXER = "mixer."
"""How the names of its tensors begin in a run with BatchFormer; a method that continues such a run discards them."""


class BatchMixer(nn.Module):
    """Features [B, D] or [B, E, D] → the same shape; the samples of the batch are the tokens of a sequence.

    One encoder for all experts, whose features do not attend to one another.

    Args:
        dim: D, also the width of the feed-forward part.
        layers: post-norm encoder layers with ReLU.
        heads: 0: 4 where D > 128, else 1.
        dropout: of attention, feed-forward part and residual branches.
        chunks: parts of the batch that attend separately, as the GPUs of `DataParallel` do: of ⌈B / chunks⌉ samples,
            the last one of what is left.
        kaiming: feed-forward part and output projection start Kaiming-normal, as the original's CIFAR networks
            initialise every linear layer; else as torch does.

    Raises:
        UserError: D is no multiple of the heads, or `dropout` is no share below 1.
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
            divisors = [each for each in range(1, heads) if dim % each == 0]
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
        """Features [B, D] or [B, E, D] in any dtype; `present` [B] is False for a sample that nobody attends to."""
        x = features.to(self.dtype)
        x = x.unsqueeze(0) if x.ndim == 2 else x.transpose(0, 1)  # [E, B, D]
        x = x.masked_fill(~present.view(1, -1, 1), 0)  # whatever stands there: 0 · NaN is not 0
        parts = zip(x.chunk(self.chunks, 1), present.chunk(self.chunks), strict=True)
        x = torch.cat([self._attend(part, here) for part, here in parts], 1)
        return x.squeeze(0) if features.ndim == 2 else x.transpose(0, 1)

    def _attend(self, x: Tensor, present: Tensor) -> Tensor:
        """One part [E, S, D], of which some samples [S] are present; where none is, all are."""
        absent = ~present & present.any()
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=absent.expand(len(x), -1))
        return x
