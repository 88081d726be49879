"""Model folders written before a denoiser's blocks were stacked [bodies, blocks of a body, ...].

In them `double.block.*` was stacked [bodies, ...], and the two single blocks of a body were `single.first.*` and
`single.second.*`. Only reading knows of this; what is written has today's names.
"""

from collections.abc import Iterable

_OLDER = {"double.block": "double.blocks", "single.first": "single.blocks", "single.second": "single.blocks"}
"""Older names and today's; those that share one are a body's blocks in this order."""


def joined(leaves: Iterable[str]) -> dict[str, list[str]]:
    """Of the stored leaves ("dit.single.first.out.kernel") those of older names, by the leaf of today that they make,
    stacked along its axis 1 ("dit.single.blocks.out.kernel")."""
    leaves, made = list(leaves), {}
    for older, newer in _OLDER.items():
        for leaf in leaves:
            module, _, name = leaf.partition(".")
            if name.startswith(f"{older}."):
                made.setdefault(f"{module}.{newer}{name.removeprefix(older)}", []).append(leaf)
    return made
