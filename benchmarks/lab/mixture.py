# SPDX-License-Identifier: Apache-2.0
"""Chooses training windows so that each domain has its share."""

import torch


def mixed(
    domains: torch.Tensor,
    names: list[str],
    mixture: dict[str, float],
    total: int,
    seed: int,
) -> torch.Tensor:
    """Draws windows by domain: whole passes in random order, then a part of one.

    Args:
        domains: index into `names` of each window, [windows].
        names: of the domains.
        mixture: share of each domain; a domain it lacks is not drawn.
        total: windows to draw.
        seed: of the order.

    Returns:
        Indices of windows in random order, [about total]: counts are rounded.

    Raises:
        ValueError: a domain of the mixture has no windows.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for name, share in mixture.items():
        known = names.index(name) if name in names else -1
        rows = (domains == known).nonzero().flatten()
        if len(rows) == 0:
            raise ValueError(f"the mixture asks for {name}, but no window is of it")
        count = round(share * total)
        for start in range(0, count, len(rows)):
            order = torch.randperm(len(rows), generator=generator)
            drawn.append(rows[order[: count - start]])
    chosen = torch.cat(drawn)
    return chosen[torch.randperm(len(chosen), generator=generator)]
