"""The columns of OpenRLHF 0.9's KTO data, by its key flags."""

from pipa_openrlhf.errors import UserError


def rename_kto_columns(
    rows: list[tuple[str, dict]], input_key: str, output_key: str | None, label_key: str
) -> list[tuple[str, dict]]:
    """Rows as ``{prompt, completion, label}``.

    Args:
        rows: (where, row) pairs.
        output_key: None: ``input_key`` holds a whole conversation, whose last message is the answer.

    Raises:
        UserError: a row lacks one of the columns, or its conversation has no answer.
    """
    return [(where, _renamed(where, row, input_key, output_key, label_key)) for where, row in rows]


def _renamed(where: str, row: dict, input_key: str, output_key: str | None, label_key: str) -> dict:
    for name, key in (("input", input_key), ("output", output_key), ("label", label_key)):
        if key is not None and key not in row:
            raise UserError(f"{where}: no column {key!r}, which --data.{name}_key names; it has {', '.join(row)}")
    prompt = row[input_key]
    if output_key is not None:
        completion = row[output_key]
    elif isinstance(prompt, list) and len(prompt) > 1:
        prompt, completion = prompt[:-1], prompt[-1:]
    else:
        raise UserError(
            f"{where}: {input_key!r} is no conversation of two messages or more; give --data.output_key for the answer"
        )
    kept = {"problem_id": row["problem_id"]} if "problem_id" in row else {}
    return {**kept, "prompt": prompt, "completion": completion, "label": row[label_key]}
