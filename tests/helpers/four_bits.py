"""A linear layer of 4 bits that holds what bitsandbytes' does, and computes by plain code."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from refreekv.core.four_bits import NESTED_BLOCK

NF4 = torch.tensor(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
     0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
)  # fmt: skip


class FourBitLinear(nn.Linear):
    """A linear layer rounded to the nearest of 16 numbers times the largest of each block."""

    calls = 0

    def __init__(self, linear: nn.Linear, nested: bool = False, block: int = 64, book: Tensor = NF4):
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        blocks = linear.weight.detach().float().view(-1, block)
        absmax = blocks.abs().amax(1)
        codes = ((blocks / absmax[:, None])[..., None] - book).abs().argmin(-1).view(-1, 2)
        self.weight = nn.Parameter((codes[:, :1] << 4 | codes[:, 1:]).to(torch.uint8), requires_grad=False)
        self.weight.quant_state = SimpleNamespace(
            absmax=absmax, code=book.clone(), blocksize=block, shape=linear.weight.shape, state2=None, offset=None,
            packing_format_for_cpu=False,
        )  # fmt: skip
        if nested:
            self._nest(self.weight.quant_state)
        self.bias = linear.bias

    def _nest(self, state: SimpleNamespace) -> None:
        offset = state.absmax.mean()
        groups = nn.functional.pad(state.absmax - offset, (0, -len(state.absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
        scales, book = groups.abs().amax(1), torch.linspace(-1, 1, 256)
        codes = ((groups / scales[:, None] + 1) * 127.5).round().to(torch.uint8).flatten()[: len(state.absmax)]
        state.state2 = SimpleNamespace(absmax=scales, code=book, blocksize=NESTED_BLOCK)
        state.absmax, state.offset = codes, offset

    def forward(self, x: Tensor) -> Tensor:
        """As the library does it: the matrix is made in the input's type."""
        FourBitLinear.calls += 1
        state, codes = self.weight.quant_state, self.weight
        factors = state.absmax
        if state.state2 is not None:
            scales = state.state2.absmax.repeat_interleave(NESTED_BLOCK)[: len(factors)]
            factors = state.state2.code[factors.int()] * scales + state.offset
        numbers = state.code[torch.cat((codes >> 4, codes & 15), 1).int()].view(-1, state.blocksize)
        weight = (numbers * factors[:, None]).view(self.out_features, self.in_features)
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)
