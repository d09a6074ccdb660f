"""A JSONL file that grows batch by batch and can be continued after the process was killed."""

import json
import os

from pipa_openrlhf.errors import UserError


class RowFile:
    """Rows on disk, and the settings that made them in ``<path>.settings.json`` beside it.

    A file is continued only under the settings that it was begun with. A last line that was torn off when the process
    died is dropped.

    Raises:
        UserError: the file was made with other settings, or a line of it cannot be read.
    """

    def __init__(self, path: str, settings: dict):
        self.path = path
        self.rows: list[dict] = []
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        settings = json.loads(json.dumps(settings))
        settings_path = f"{path}.settings.json"
        if os.path.exists(path):
            _check_settings(path, settings_path, settings)
            self._read()
        else:
            with open(settings_path, "w", encoding="utf-8") as file:
                json.dump(settings, file, indent=1)
                file.write("\n")

    def append(self, rows: list[dict]) -> None:
        """Add rows; they are on disk when this returns."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows

    def _read(self) -> None:
        with open(self.path, "rb") as file:
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self.rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{self.path}, line {number}: not JSON; delete the line to continue") from error


def _check_settings(path: str, settings_path: str, settings: dict) -> None:
    try:
        with open(settings_path, encoding="utf-8") as file:
            before = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} exists and {settings_path} does not say how it was made: choose another") from error
    for name in settings | before:
        if before.get(name) != settings.get(name):
            raise UserError(
                f"{path} was made with {name} {before.get(name)}, not {settings.get(name)}: "
                "choose another output, or delete this one"
            )
