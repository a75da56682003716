"""`Retrofit`: the record of one retrofit, as `retrofit.json` and `retrofit.md` hold it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alibi_hf.checkpoints.writer import write_json
from alibi_hf.retrofitting.weights import WeightCheck

SCHEMA_VERSION = 1
FILE, PAGE = "retrofit.json", "retrofit.md"
STATEMENT = (
    "This model computes something else than its source: the weights are the source's, but its {positions} positions "
    "were removed and ALiBi was put in their place. It has to be trained on before it reads as well as the source did. "
    "There is no parity to prove, and none is claimed."
)


@dataclass
class Retrofit:
    """What was retrofitted, from which files, to which, and whether the weights arrived.

    Attributes:
        output_path: the folder that was written.
        source: path_or_id, revision, family (the source's layout) and files (name, sha256, bytes).
        output: files (name, sha256, bytes) of the weights.
        tensors: source, target names, rule, fate and reason of every tensor.
        config: the source's config ("from"), ours ("to") and the defaults that the source's code fills in ("defaults").
        statement: what the model is, and is not.
        notes: what became of the positions, and why the weights were not checked where they were not.
        checks: the comparisons that show that the weights arrived; empty where there was none.
        versions: of Python and the packages that took part.
        command: what was run.
    """

    output_path: Path
    source: dict[str, Any]
    output: dict[str, Any]
    tensors: list[dict[str, Any]]
    config: dict[str, Any]
    statement: str
    notes: list[str]
    checks: list[WeightCheck]
    versions: dict[str, str]
    command: str

    @property
    def weights(self) -> str:
        """Whether the weights arrived, in words."""
        if not self.checks:
            return "not checked"
        errors = ", ".join(f"{check.error:.0e} {check.name}" for check in self.checks)
        return f"arrived: largest difference in float64, over the largest logit, {errors}"

    def to_dict(self) -> dict[str, Any]:
        """The content of `retrofit.json`."""
        shown = {name: value for name, value in vars(self).items() if name != "output_path"}
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        return {"schema_version": SCHEMA_VERSION, **shown, "checks": checks}

    def save(self, directory: str | Path) -> Path:
        """Write `retrofit.json` and `retrofit.md` into `directory` and return the path of the first."""
        path = write_json(Path(directory) / FILE, self.to_dict())
        (Path(directory) / PAGE).write_text(self._markdown(), encoding="utf-8")
        return path

    def _markdown(self) -> str:
        fates = [tensor["fate"] for tensor in self.tensors]
        ours = self.config["to"]
        lines = [
            f"# {Path(self.source['path_or_id']).name}, retrofitted with ALiBi",
            "",
            self.statement,
            "",
            *(f"* {note[0].upper()}{note[1:]}." for note in self.notes),
            f"* Tensors: {', '.join(f'{fates.count(fate)} {fate}' for fate in ('used', 'tied', 'dropped'))}; "
            f"`{FILE}` lists each.",
            f"* Slopes: {ours['num_attention_heads']} heads, alibi_bias_max {ours['alibi_bias_max']:g}; "
            f"max_position_embeddings {ours['max_position_embeddings']}, which is no ceiling.",
            f"* Weights {self.weights}.",
        ]
        return "\n".join(lines) + "\n"


__all__ = ["FILE", "PAGE", "STATEMENT", "Retrofit"]
