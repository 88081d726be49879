"""Batches of examples, of which each process draws its own rows."""

import grain

from mi_jax.errors import InputError


def batches(examples: grain.MapDataset, size: int, share: int = 0, shares: int = 1) -> grain.MapDataset:
    """Batches of `size` examples in a row; of each, rows `share * size / shares` up to the next share's.

    The shares of a batch, joined, are the batch, and the others' examples are never drawn.

    Raises:
      InputError: the batch does not divide into so many shares.
    """
    if size % shares:
        raise InputError(f"a batch of {size} does not divide into {shares} shares, one for each process")
    if shares > 1:
        examples = _Rows(examples, size, share, shares)
    return examples.batch(size // shares, drop_remainder=True)


class _Rows(grain.MapDataset):
    """The examples that fall to one share, batch after batch."""

    def __init__(self, examples: grain.MapDataset, size: int, share: int, shares: int):
        super().__init__(examples)
        self._size, self._rows, self._first = size, size // shares, share * (size // shares)

    def __len__(self) -> int:
        return len(self._parent) // self._size * self._rows

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._rows)
        return self._parent[batch * self._size + self._first + row]
