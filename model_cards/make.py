"""Every file of this folder that is made: the cards, and the table of them. The same facts give the same bytes."""

from pathlib import Path

from alibi_hf.hub.card_metadata import HUB
from alibi_hf.hub.card_text import code, table
from model_cards.published import HERE, Published, read_facts, upstream_card
from model_cards.shipped import SHIPPED, shipped_card

INDEX = "README.md"
INTRODUCTION = """# Model cards

Of the two shipped checkpoints, and of published ones: what is known of each, and the commands that apply to it. Made by
`make cards` from `facts.yaml`; what could not be read is left out there, and an empty cell here. `alibi-hf convert`
writes its own card beside the weights.
"""


def index(entries: list[Published]) -> str:
    """README.md of this folder: a table of all cards."""
    rows = [[f"[{name}]({name}.md)", SHIPPED[name].lower(), "in `examples/checkpoints`", "", ""] for name in SHIPPED]
    rows += [_row(entry) for entry in entries]
    lines = table(["card", "family", "checkpoint", "layers x width", "licence"], rows)
    return f"{INTRODUCTION}\n{lines}\n"


def _row(entry: Published) -> list[str]:
    config, licence = entry.own_config, entry.facts.get("license", "")
    shape = f"{config.num_hidden_layers} x {config.hidden_size}, {config.num_attention_heads} heads" if config else ""
    address = f"[{code(entry.id)}]({HUB}/{entry.id})"
    return [f"[{entry.name}]({entry.name}.md)", entry.family, address, shape, code(licence)]


def cards() -> dict[str, str]:
    """The text of every file, by its name."""
    entries = read_facts()
    made = {f"{name}.md": shipped_card(name) for name in SHIPPED}
    made |= {f"{entry.name}.md": upstream_card(entry) for entry in entries}
    return {**made, INDEX: index(entries)}


def write_all(folder: Path = HERE) -> list[Path]:
    """Write every card and the table of them into `folder`."""
    paths = []
    for name, text in cards().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
        paths.append(folder / name)
    return paths
