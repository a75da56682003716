"""What a reach says in words, and how its numbers are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from alibi_hf.evaluation.bias_alone import DTYPES, KEYS
from alibi_hf.evaluation.reach_report import COLLAPSED

if TYPE_CHECKING:
    from alibi_hf.evaluation.reach_report import HeadReach, LengthReach, Reach

NAMED = 12  # heads that a sentence names, at most
HOW_TO_READ = (
    "A distance is in tokens, 0 for the query's own token; it is weighted by attention and averaged over all queries.",
    "By bias alone: how far a head would attend if all keys were alike to it. A head far above that looks for something"
    " far away; one far below looks at its neighbours, or at its own token.",
    "Within 50 %, 90 %: the distance within which that share of the attention of all queries lies.",
    f"Collapsed: more than {COLLAPSED:.0%} of what the queries in the second half of the text attend to is the first "
    "token, where nothing was written that they could need.".replace("%", " %"),
    "Entropy: of a query's weights, in nats; as even ones over e to that power keys have it. G: what decides "
    "a window besides the slope, how far the norms of queries and keys let a far score rise above the near ones.",
    "Window: keys farther away provably cannot change what the head computes in this dtype. Left out: the share of all "
    "causal pairs of query and key that this is. sdpa on CPU reads neighbouring heads and whole tiles together, and so "
    "leaves out less, and nothing from a text of fewer than 1024 tokens; GPUs have tiles of their own.",
)


def findings(report: Reach) -> list[str]:
    """Return what the longest text shows, a sentence or two a line."""
    found = report.longest
    return [_distances(found), _against_bias(found), _collapsed(found), _windows(report), *_rounding(found)]


def percent(share: float) -> str:
    """Return a share as a percentage with one digit after the point, never rounded up to 100."""
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", " %")
    return f"{min(share, 0.999):.1%}".replace("%", " %")


def model_name(report: Reach) -> str:
    """Return the last part of the path or id that the model was loaded from."""
    return Path(report.path_or_id).name or report.path_or_id


def tokens(distance: float) -> str:
    """Return a distance with one digit after the point."""
    return f"{distance:.1f}"


def name(head: HeadReach) -> str:
    """Return what a head is called."""
    return f"layer {head.layer}, head {head.head}"


def spread(values: Sequence[float], form: str = "{}") -> str:
    """Return the smallest and the largest of some values, or the one that they all are as it is written."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _distances(found: LengthReach) -> str:
    near, far = (pick(found.heads, key=lambda head: head.mean_distance) for pick in (min, max))
    return (
        f"In {found.length} tokens a head attends {tokens(found.mean_distance)} tokens back on average: from "
        f"{tokens(near.mean_distance)} ({name(near)}, slope {near.slope:.3g}) to {tokens(far.mean_distance)} "
        f"({name(far)}, slope {far.slope:.3g})."
    )


def _against_bias(found: LengthReach) -> str:
    ratios = [head.over_bias for head in found.heads]
    return (
        f"That is {median(ratios):.2f} times (the median; {spread(ratios, '{:.2f}')}) what the bias alone would give: "
        "at 1.00 the text does not change how far a head looks, only at which of the keys there."
    )


def _collapsed(found: LengthReach) -> str:
    late = max(head.late_first_token for head in found.heads)
    if not found.collapsed:
        return f"No head is collapsed: at most {percent(late)} of a head's late attention goes to the first token."
    heads = [name(head) for head in found.collapsed[:NAMED]]
    rest = len(found.collapsed) - len(heads)
    return (
        f"{len(found.collapsed)} of {len(found.heads)} heads are collapsed onto the first token: {'; '.join(heads)}"
        + (f"; and {rest} more." if rest else ".")
    )


def _windows(report: Reach) -> str:
    found = report.longest
    if all(head.gap is None for head in found.heads):
        return f"No window is proved ({found.plans[0].removeprefix('dense: ')})."
    shares = "; ".join(
        f"at {length.length} tokens {percent(length.saved)} (sdpa on CPU: {percent(length.planned)})"
        for length in report.lengths
    )
    return f"Provable windows in {report.dtype} leave out, of all pairs of query and key: {shares}."


def _rounding(found: LengthReach) -> list[str]:
    """Return a line a 16-bit dtype; none for a model whose heads have no slopes."""
    lines = []
    for dtype in (str(dtype).removeprefix("torch.") for dtype in DTYPES):
        own = [entry for entry in found.rounding if entry.dtype == dtype and entry.slope > 0]
        if not own:
            continue
        keys = min(KEYS, found.length)
        absolute = spread([entry.absolute_values for entry in own])
        relative = spread([entry.relative_values for entry in own])
        zeros = spread([entry.zero_distance or 0 for entry in own])
        lines.append(
            f"Stored in {dtype} as slope times position, the bias of the last {keys} of {found.length} keys keeps "
            f"{absolute} different values; as slope times distance, that of the nearest {keys} keeps {relative}. "
            f"exp(bias) is zero in {dtype} from {zeros} tokens on, by head."
        )
    return lines


__all__ = ["HOW_TO_READ", "findings", "model_name", "name", "percent", "spread", "tokens"]
