"""Where rows come from, as a user writes it: one origin, a split, a limit, a weight. Pure configuration."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="letters, digits, _ and -")]


def refuse(*found: tuple[tuple[str | int, ...], Any, str]) -> None:
    """Raise one ValidationError that holds every (location, value, sentence) given."""
    if found:
        raise ValidationError.from_exception_data(
            "problems",
            [
                InitErrorDetails(
                    type=PydanticCustomError("cpt", "{sentence}", {"sentence": text}), loc=loc, input=value
                )
                for loc, value, text in found
            ],
        )


class Strict(BaseModel):
    """A part of the configuration: unknown keys are refused, values never change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(Strict):
    """Rows from one origin: a hub data set, a local file, a task of the harness, or rows in memory."""

    name: Name | None = Field(None, description="what reports call it; default: made from its origin")
    hub: str | None = Field(None, description="data set on the Hub, e.g. fancyzhx/ag_news")
    config: str | None = Field(None, description="configuration of the hub data set")
    revision: str | None = Field(None, description="commit or tag of the hub data set")
    file: str | None = Field(None, description=".jsonl, .json, .csv or .parquet; relative to data_root")
    task: str | None = Field(None, description="of the harness, e.g. tiny_world/reverse, mathematics/gsm8k")
    rows: list[dict[str, Any]] | None = Field(None, description="rows given in place")
    licence: str | None = Field(None, description="of the rows, e.g. Apache-2.0; said where rows are kept")
    split: str = Field("train", description="which split of the origin")
    fields: dict[str, str] = Field({}, description="canonical field -> the rows' own name for it")
    limit: int | None = Field(None, gt=0, description="use at most this many rows")
    shuffle: bool = Field(False, description="draw the limited rows at random (seeded), not the first ones")
    weight: float | None = Field(None, gt=0, description="share of the stage's rows, relative to its siblings")
    count: int | None = Field(None, gt=0, description="exactly this many rows per epoch, repeated if need be")

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        given = [key for key in ("hub", "file", "task", "rows") if getattr(self, key) is not None]
        if len(given) != 1 and sorted(given) != ["file", "hub"]:
            found = f"{' and '.join(given)} are given" if given else "none is given"
            refuse(((), self.label if given else {}, f"must name one origin: hub, file, task or rows ({found})"))
        if self.rows is not None and not self.rows:
            refuse((("rows",), [], "is empty: give at least one row"))
        if self.weight is not None and self.count is not None:
            refuse((("weight",), self.weight, "give a weight or a count, not both"))
        return self

    @property
    def label(self) -> str:
        """What reports call these rows."""
        if self.name:
            return self.name
        if self.hub or self.task:
            return f"{self.hub or self.task}:{self.split}"
        return Path(self.file).name if self.file else "rows in memory"

    def origin(self, data_root: Path | None) -> dict[str, Any]:
        """Arguments of `eval_harness.sources.read_rows`; a hub source reads its file once data_root is set."""
        if self.file and (data_root or not self.hub):
            path = Path(self.file.replace("{split}", self.split))
            return {"file": str(path if path.is_absolute() or not data_root else data_root / path)}
        if self.hub:
            return {"hub": self.hub, "config": self.config, "revision": self.revision, "split": self.split}
        if self.task:
            return {"task": self.task, "split": self.split, "revision": self.revision, "data": data_root}
        return {"rows": self.rows}


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


_OneOrMore = BeforeValidator(_as_list, json_schema_input_type=Source | list[Source])
Sources = Annotated[list[Source], _OneOrMore, Field(min_length=1)]
