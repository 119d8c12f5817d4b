"""The forms that rows of data have, told by the names of their columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

FORMS = (("messages",), ("conversations",), ("prompt", "completion"), ("text",), ("input_ids", "supervised"))
EXTRAS = ("system", "tools", "chat_template_kwargs")  # columns handed to the chat template


def listed(names: Sequence[str]) -> str:
    """Names of columns for a message of one line, of which a file may have any number, with any characters."""
    shown = [name if name.isprintable() and len(name) <= 60 else f"{name[:60]!r}" for name in names[:20]]
    return ", ".join(shown) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def form_of(columns: Sequence[str], source: str = "the data", mapped: bool = False) -> tuple[str, ...]:
    """Which of the `FORMS` rows with these columns have.

    Args:
        mapped: whether a recipe can name the columns; its key is in the message then.

    Raises:
        ValueError: none.
    """
    for form in FORMS:
        if set(form) <= set(columns):
            return form
    known = ", ".join(" + ".join(form) for form in FORMS[:-1])
    hint = " (map one with data.columns)" if mapped else ""
    raise ValueError(f"{source} has the columns {listed(columns)}; needed: {known}{hint}")


def map_columns(rows: Dataset, source: str, columns: Mapping[str, str]) -> Dataset:
    """The rows with our names for their columns, without columns of other forms.

    Args:
        source: where the rows are from, for messages.
        columns: names of ours -> names in the source.

    Raises:
        ValueError: a name is not one of ours, its column is not there, or a column is named twice.
    """
    allowed = [name for form in FORMS[:-1] for name in form] + list(EXTRAS)
    for name, given in columns.items():
        if name not in allowed:
            raise ValueError(f"columns: {name!r} is not one of {', '.join(allowed)}")
        if given not in rows.column_names:
            raise ValueError(f"{source} has no column {given!r} for {name}; there are {listed(rows.column_names)}")
    # What is mapped decides about the form: a column of another form that happens to be there must not win.
    meant = {name for form in FORMS if set(form) & set(columns) for name in form}
    others = {name for form in FORMS for name in form} - meant if meant else set()
    drop = [n for n in rows.column_names if n in others | set(columns) and n not in columns.values()]
    moved = {given: name for name, given in columns.items()}
    if len(moved) < len(columns):
        raise ValueError(f"columns: {columns} name a column twice")
    return rows.remove_columns(drop).rename_columns(moved)
