"""How much a text repeats itself: figures that need nothing but its tokens, or its bytes.

Texts of language models degenerate into loops (Holtzman et al., "The Curious Case of Neural Text Degeneration",
arXiv:1904.09751). Real text repeats itself too, the more the longer it gets: read these figures beside those of real
text at the same place.
"""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence


def distinct(tokens: Sequence[Hashable], n: int) -> float:
    """Return distinct-n: how many different n-grams there are, over how many there are; between 0 and 1.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", arXiv:1510.03055.

    Raises:
        ValueError: where there is no n-gram.
    """
    count = len(tokens) - n + 1
    if n < 1 or count < 1:
        raise ValueError(f"{len(tokens)} tokens have no {n}-gram; give a longer text.")
    return len({tuple(tokens[start : start + n]) for start in range(count)}) / count


def earlier_runs(tokens: Sequence[Hashable]) -> list[int]:
    """Return for each token how long the longest run is that ends with it and has occurred before in `tokens`.

    The two may overlap: "a a a a" gives 0, 1, 2, 3. An n-gram has been seen before where the number is at least n.

    Source: the suffix automaton of Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985).
    Time and memory are linear in the number of tokens.
    """
    edges: list[dict[Hashable, int]] = [{}]  # of each state: where a token leads
    lengths, links = [0], [-1]  # of each state: its longest run; the state of the longest suffix that occurs elsewhere
    last, runs = 0, []
    for token in tokens:
        state, new = last, len(edges)
        edges.append({})
        lengths.append(lengths[last] + 1)
        links.append(0)
        while state >= 0 and token not in edges[state]:
            edges[state][token] = new
            state = links[state]
        if state >= 0:
            target = edges[state][token]
            if lengths[target] > lengths[state] + 1:  # it holds longer runs too, which have not ended here: split it
                copy = len(edges)
                edges.append(dict(edges[target]))
                lengths.append(lengths[state] + 1)
                links.append(links[target])
                while state >= 0 and edges[state].get(token) == target:
                    edges[state][token] = copy
                    state = links[state]
                links[target] = target = copy
            links[new] = target
        last = new
        runs.append(lengths[links[new]])
    return runs


def seen_before(runs: Sequence[int], n: int) -> float:
    """Return the share of tokens that end an n-gram seen before in the text.

    Args:
        runs: some or all of `earlier_runs(tokens)`.
        n: tokens of an n-gram.
    """
    return sum(run >= n for run in runs) / len(runs)


def compression(text: str) -> float:
    """Return how many times smaller zlib makes the UTF-8 bytes of `text`; loops give large numbers."""
    data = text.encode()
    return len(data) / len(zlib.compress(data, level=9))
