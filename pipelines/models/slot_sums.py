"""Input statistics summed slot by slot, whichever rank has a slot: the same bits on any number of ranks.

Knows statistics and ranks; not how they are gathered.
"""

from collections.abc import Mapping

import torch

from ...compress.statistics import MOMENTS, InputStatistics
from ..errors import InputError
from ..ranks.exchange import OrderedSum, Ranks
from .structure import Site

Names = tuple[str, ...]
"""Of the sites that read one input."""


class SlotSums:
    """Moments are added up between the ranks while slots come in, so that each has its slot's and its part of the total; vectors and samples
    at the end. There is a sum for every group of sites that any rank has seen."""

    def __init__(self, sites: list[Site], needs: frozenset[str], device: torch.device, ranks: Ranks) -> None:
        self.sites = {site.name: site for site in sites}
        self.needs, self.device, self.ranks = needs, device, ranks
        self.rounds = 0
        self.group_of: dict[str, Names] = {}
        self.samples: dict[Names, int] = {}
        self.moments: dict[Names, dict[str, OrderedSum]] = {}
        self.vectors: dict[int, dict[Names, InputStatistics]] = {}

    def add(self, result: Mapping[str, InputStatistics]) -> None:
        """A round: one call on every rank, with what came of its slot. InputError for sites that read one tensor in one slot and several in
        another."""
        here, size = self._by_input(result), self.ranks.size
        everyone = self.ranks.gathered({names: statistics.tokens for names, statistics in here.items()})
        for names in dict.fromkeys(names for of_rank in everyone for names in of_rank):
            self._meet(names)
            tokens = [of_rank.get(names, 0) for of_rank in everyone]
            for name, total in self.moments[names].items():
                total.add(getattr(here[names], name) if names in here else None)
            if names in here:
                before = self.samples[names] + sum(tokens[: self.ranks.rank])
                slot = self.vectors.setdefault(self.rounds * size + self.ranks.rank, {})
                slot[names] = here[names].without_moments(before, self.device if size == 1 else torch.device("cpu"))
            self.samples[names] += sum(tokens)
        self.rounds += 1

    def total(self) -> dict[str, InputStatistics]:
        """By site, on every rank: sites that read one input share its statistics, experts that no token reached have empty ones."""
        slots = self.ranks.in_order(self.vectors).values()
        out: dict[str, InputStatistics] = {}
        for names, moments in self.moments.items():
            whole = self._empty(names[0])
            for slot in slots:
                if names in slot:
                    whole.add(slot[names])
            for name, total in moments.items():
                setattr(whole, name, total.total())
            out |= dict.fromkeys(names, whole)
        return out | {name: self._empty(name) for name, site in self.sites.items() if site.expert is not None and name not in out}

    def _by_input(self, result: Mapping[str, InputStatistics]) -> dict[Names, InputStatistics]:
        """Every accumulator that has seen a token, by the sites that share it."""
        names: dict[int, Names] = {}
        for name in self.sites:
            if name in result and result[name].tokens:
                names[id(result[name])] = (*names.get(id(result[name]), ()), name)
        return {group: result[group[0]] for group in names.values()}

    def _meet(self, names: Names) -> None:
        for name in names:
            if self.group_of.setdefault(name, names) != names:
                raise InputError(f"{', '.join(names)}: read one tensor at times and several at others; this architecture is not supported")
        if names not in self.moments:
            features = self.sites[names[0]].shape[1]
            like_II = torch.zeros(1, device=self.device).expand(features, features)
            self.moments[names] = {MOMENTS[need]: OrderedSum(self.ranks, like_II) for need in sorted(self.needs & MOMENTS.keys())}
            self.samples[names] = 0

    def _empty(self, name: str) -> InputStatistics:
        return InputStatistics(self.sites[name].shape[1], self.needs, self.device)
