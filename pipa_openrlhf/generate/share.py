"""The answers of one file, shared out among the ranks of a launcher or of Ray.

A rank takes whole batches, the same as one process would make, and writes its rows to a file of its own beside the one
that was asked for, ``<path>.rank<R>``. At the end, or when a run that was stopped is started again, with any number of
ranks, the rows come together in the file, in the order in which one process would write them. Ranks tell each other
their rows: they need no folder that all of them see, though a restart finds only what it sees.
"""

import glob
import json
import os
import re
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta

from torch import distributed as dist

from pipa_openrlhf.distributed.strategy import join_launched_group
from pipa_openrlhf.generate.job import Job
from pipa_openrlhf.generate.problems import RowFile, settings_of_rows
from pipa_openrlhf.generate.sampling import plan_batches


class Share:
    """A rank's part of a job. Every rank makes one, answers it, and calls :meth:`merge`.

    Args:
        job: the whole job.
        path: JSON Lines of all rows.
        settings: what decides the rows, see :class:`RowFile`. Parts that were made with others are deleted.
        keeps_parts: take what ranks of a run that was stopped have left.

    Attributes:
        job: the problems of this rank's batches; all of them without a launcher.
        file: gets this rank's rows; it knows those that were there before, of all ranks.

    Raises:
        UserError: the file was made with other settings, or cannot be read.
    """

    def __init__(self, job: Job, path: str, settings: dict, keeps_parts: bool = True):
        rank, self._world_size = join_launched_group(job.config.local_rank)
        # Ranks end hours apart, and what they tell each other is in the host's memory.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if self._world_size > 1 else None
        self._path, self._whole_job = path, job
        self._whole = RowFile(path, settings) if rank == 0 else None
        left = self._gathered(_rows_of_parts(path, settings) if keeps_parts else [])
        self._takes_over = bool(left)
        if self._whole is not None:
            self._whole.append(_missing(self._whole.rows, left))
        known = self._gathered(self._whole.rows if self._whole is not None else [])
        _delete_parts(path)
        self._num_known = len(known)
        if self._whole is not None and self._world_size == 1:
            self.job, self.file = job, self._whole
            return
        dist.barrier(self._group)  # no rank deletes what another one begins
        mine = sorted(index for batch in _batches(job)[rank :: self._world_size] for index in batch)
        self.job = replace(
            job, problems=[job.problems[index] for index in mine], prompts=[job.prompts[index] for index in mine]
        )
        self.file = RowFile(f"{path}.rank{rank}", settings)
        self.file.rows += known

    def merge(self) -> list[dict] | None:
        """Write the file that was asked for; its rows on rank 0, None elsewhere."""
        if self._world_size > 1:
            rows = self._gathered(self.file.rows[self._num_known :])
            if self._whole is not None:
                self._whole.append(_missing(self._whole.rows, rows))
        if self._whole is not None and (self._world_size > 1 or self._takes_over):
            ids = [self._whole_job.problems[index].problem_id for index in sum(_batches(self._whole_job), [])]
            places = {problem_id: place for place, problem_id in enumerate(ids)}
            self._whole.reorder(lambda row: (places[row["problem_id"]], row["sample"]))
        if self._world_size > 1:
            dist.barrier(self._group)  # the file has all rows before their parts go
            _delete_parts(self._path)
        return self._whole.rows if self._whole is not None else None

    def _gathered(self, rows: list[dict]) -> list[dict]:
        """The rows of all ranks, each once; a collective call."""
        if self._world_size == 1:
            return rows
        by_rank: list[list[dict]] = [[]] * self._world_size
        dist.all_gather_object(by_rank, rows, self._group)
        found: list[dict] = []
        for of_rank in by_rank:
            found += _missing(found, of_rank)
        return found


def _batches(job: Job) -> list[list[int]]:
    return plan_batches(job.prompts, job.sampling)


def _missing(rows: list[dict], more: list[dict]) -> list[dict]:
    """Of ``more`` the first row of each answer that ``rows`` lacks."""
    seen = {(row["problem_id"], row["sample"]) for row in rows}
    found = []
    for row in more:
        answer = (row["problem_id"], row["sample"])
        if answer not in seen:
            seen.add(answer)
            found.append(row)
    return found


def _parts(path: str) -> list[str]:
    """Files of ranks that this machine sees, their settings included."""
    found = glob.glob(f"{glob.escape(path)}.rank*")
    return sorted(one for one in found if re.fullmatch(r"\.rank\d+(\.settings\.json)?", one[len(path) :]))


def _rows_of_parts(path: str, settings: dict) -> list[dict]:
    rows = []
    for part in _parts(path):
        if not part.endswith(".json") and settings_of_rows(part) == json.loads(json.dumps(settings)):
            with open(part, encoding="utf-8") as file:
                rows += [json.loads(line) for line in file if line.endswith("\n")]
    return rows


def _delete_parts(path: str) -> None:
    for part in _parts(path):
        with suppress(FileNotFoundError):  # another rank was faster
            os.remove(part)
