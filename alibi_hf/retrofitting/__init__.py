"""ALiBi models made of checkpoints with other positions: `retrofit`, one module a source layout, and the report.

A source layout is no family: what comes out computes something else than the source and must be trained on.
"""

from alibi_hf.retrofitting.report import Retrofit
from alibi_hf.retrofitting.retrofit import retrofit

__all__ = ["Retrofit", "retrofit"]
