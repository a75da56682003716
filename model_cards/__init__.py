"""The cards of this folder and the program that makes them: `python -m model_cards`."""
