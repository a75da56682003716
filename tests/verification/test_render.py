"""The page of Markdown: what stands in a cell of its table stays in that cell."""

import re

from alibi_hf.verification.render import COLUMNS, as_markdown
from alibi_hf.verification.report import Check, Control, Verification


def test_bars_in_names_do_not_end_cells() -> None:
    checks = [Check("logits | odd", "float32", 40, 1e-7, 1e-7, 2e-7, True)]
    controls = [Control("slopes|wrong", "logits | odd", 1.0, 0.1, True)]
    reference = {"class": "Upstream", "attn_implementation": "eager"}
    report = Verification("in", "out", "bloom", reference, "random", checks, controls, {"torch": "2"})
    rows = [line for line in as_markdown(report).splitlines() if line.startswith("| ")]
    assert len(rows) == 3
    assert all(len(re.split(r"(?<!\\)\|", row)) == len(COLUMNS) + 2 for row in rows)
    assert r"| logits \| odd | float32 |" in rows[1] and r"slopes\|wrong" in rows[2]
