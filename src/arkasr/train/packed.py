"""Several texts of one clip in one row: the prompt once, and each text behind it as if it stood there alone.

    prompt | text 1 | text 2 | ...        positions go on from the prompt's end in each text, which sees only
                                          the prompt and itself

Unusual: K rollouts cost one prompt and K texts, not K of both; the numbers are those of K rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arkasr.model import ArkASR

Ids = Sequence[int]


@dataclass(frozen=True)
class Packed:
    """Rows of prompts and their texts.

    Attributes:
        ids, positions: [B, L], padded on the right.
        mask: [B, 1, L, L], True where a place (second last axis) sees another.
        rows, columns: [N] each, the place that predicts each token of each text, in order.
        targets: [N], those tokens.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor

    def hidden(self, network: ArkASR, embeddings: Tensor) -> Tensor:
        """The decoder's states [N, H] that predict each token, of audio embeddings [B, A, H]."""
        states = network.decoder(network.embed(self.ids, embeddings), self.positions, mask=self.mask)
        predicting: Tensor = states[self.rows, self.columns]
        return predicting


def pack(prompts: Sequence[Ids], texts: Sequence[Sequence[Ids]], *, padding: int, device: torch.device) -> Packed:
    """Rows of each clip's prompt with its texts behind it; a text's last token is predicted, and needs no place."""
    lengths = [len(p) + sum(max(len(text) - 1, 0) for text in those) for p, those in zip(prompts, texts, strict=True)]
    shape = len(prompts), max(lengths)
    ids = torch.full(shape, padding)
    positions = torch.zeros(shape, dtype=torch.long)
    owners = torch.zeros(shape, dtype=torch.long)  # 0 the prompt, then the number of the text
    places: list[tuple[int, int]] = []
    targets: list[int] = []
    for row, (prompt, those) in enumerate(zip(prompts, texts, strict=True)):
        end = len(prompt)
        ids[row, :end] = torch.tensor(prompt)
        positions[row, :end] = torch.arange(end)
        owners[row, end:] = -1
        for number, text in enumerate(those, start=1):
            if not text:
                continue
            begin, end = end, end + len(text) - 1
            ids[row, begin:end] = torch.tensor(text[:-1], dtype=torch.long)
            positions[row, begin:end] = torch.arange(len(prompt), len(prompt) + len(text) - 1)
            owners[row, begin:end] = number
            places += [(row, len(prompt) - 1), *((row, column) for column in range(begin, end))]
            targets += text
    earlier = torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
    mask = earlier & ((owners[:, None, :] == 0) | (owners[:, None, :] == owners[:, :, None]))
    rows, columns = torch.tensor(places, dtype=torch.long).reshape(-1, 2).unbind(1)
    made = ids, positions, mask[:, None], rows, columns, torch.tensor(targets, dtype=torch.long)
    return Packed(*(value.to(device) for value in made))
