"""Make every card of this folder from `facts.yaml` and the shipped checkpoints: `python -m model_cards`."""

from model_cards.make import write_all

print(f"{len(write_all())} files written")
