"""`python -m alibi_hf.cli`, where the script `alibi-hf` is not on the path."""

from alibi_hf.cli import app

app()
