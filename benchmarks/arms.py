"""The arms of ``train_step.py`` on one kind of answers: start them, see that they agree, count, and time in turns."""

import os
import statistics
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from answers import Data, tokens_left
from inputs import Expected, expected_sequences, usual_rank, write_data
from targets import Ratio
from turns import Spec, Worker, WorkerFailed

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True)
class Section:
    """What is run: answers, arms, and whether layers are computed again in the backward pass."""

    data: Data
    arms: tuple[str, ...]
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """As in ``--only``."""
        return self.data.name + ("_checkpointing" if self.checkpointing else "")


def run_section(options: Namespace, section: Section, model: str, folder: Path) -> dict:
    """Start every arm, check that all train on the same, measure in turns."""
    problems = section.data.problems
    write_data(folder, problems)
    expected = expected_sequences(problems)
    load_before = os.getloadavg()
    workers, failures = start_workers(options, section, model, folder, expected)
    try:
        counted, sequences = count_and_ask(workers, failures)
        leave_out_readers_of_less(expected, workers, sequences, failures)
        agreement = check_sequences(expected, sequences, TOLERANCE[options.dtype])
        timed = measure_in_turns(workers, failures, options.repeats)
    finally:
        for worker in workers.values():
            worker.close()
    if "pipa" not in timed:
        raise SystemExit(f"ours did not run: nothing to compare with: {failures}")
    every, with_prompts_once, distinct = tokens_left(problems)
    of_different = sum(one.tokens for one in expected.values())
    return {
        "checkpointing": section.checkpointing,
        "sequences": sum(one.times for one in expected.values()),
        "different_sequences": len(expected),
        "tokens": every,
        "loss_tokens": sum(one.loss_tokens * one.times for one in expected.values()),
        "left_with_prompts_shared": with_prompts_once / every,
        "left": distinct / every,
        "left_of_different": distinct / of_different,
        "of_least": counted["pipa"]["round"]["flops"] / sum(counted["pipa"]["least"].values()),
        "log_prob_difference": agreement,
        "load": [load_before, os.getloadavg()],
        "counted": counted,
        "timed": timed,
        "failures": failures,
    }


def start_workers(
    options: Namespace, section: Section, model: str, folder: Path, expected: dict[str, Expected]
) -> tuple[dict[str, Worker], dict[str, str]]:
    """Workers at the entrance of their loops, and the first line of what went wrong with the others."""
    sequences = sum(one.times for one in expected.values())
    workers: dict[str, Worker] = {}
    failures: dict[str, str] = {}
    for arm in section.arms:
        spec = Spec(
            arm=arm,
            model=model,
            folder=str(folder),
            dtype=options.dtype,
            checkpointing=section.checkpointing,
            batch_size=section.data.batch_size,
            micro_batch_size=min(
                section.data.batch_size, options.our_micro if arm.startswith("pipa") else options.micro
            ),
            steps_per_round=sequences // section.data.batch_size,
            # OpenRLHF wants room for two tokens after the prompt.
            max_length=max(one.tokens for one in expected.values()) + 2,
            rank=usual_rank(options.shape),
        )
        try:
            workers[arm] = Worker(spec, folder / f"{arm}.log")
        except WorkerFailed as error:
            failures[arm] = str(error)
    for arm in list(workers):
        try:
            workers[arm].read()
        except WorkerFailed as error:
            failures[arm] = str(error)
            workers.pop(arm).close()
    return workers, failures


def count_and_ask(workers: dict[str, Worker], failures: dict[str, str]) -> tuple[dict, dict]:
    """Counted rounds of every arm and what it trained on; arms that end here move to ``failures``."""
    counted, sequences = {}, {}
    for arm in list(workers):
        try:
            counted[arm] = {"round": workers[arm].ask("count")}
            if arm.startswith("pipa"):
                counted[arm]["least"] = workers[arm].ask("least")
                counted[arm]["prior"] = workers[arm].ask("count prior")
            sequences[arm] = workers[arm].ask("sequences")
        except WorkerFailed as error:
            failures[arm] = str(error)
            workers.pop(arm).close()
    return counted, sequences


def leave_out_readers_of_less(
    expected: dict[str, Expected], workers: dict[str, Worker], sequences: dict[str, dict], failures: dict[str, str]
) -> None:
    """Arms of others whose reader drops sequences, as ms-swift's drops pairs of equal answers, are not compared."""
    for arm in [arm for arm in workers if not arm.startswith("pipa")]:
        if missing := set(expected) - set(sequences[arm]["log_probs"]):
            failures[arm] = f"its reader leaves out {len(missing)} of the {len(expected)} different sequences"
            sequences.pop(arm)
            workers.pop(arm).close()


def check_sequences(expected: dict[str, Expected], replies: dict[str, dict], tolerance: float) -> float:
    """Largest relative difference of a sequence's log-prob between two arms.

    Raises:
        SystemExit: an arm trained on other tokens, or its log-probs differ.
    """
    worst = 0.0
    reference = next(iter(replies.values()), {}).get("log_probs", {})
    for arm, reply in replies.items():
        missing = set(expected) - set(reply["log_probs"])
        if missing:
            raise SystemExit(f"{arm}: {len(missing)} of {len(expected)} sequences have other tokens or other prompts")
        mine = [(reply["log_probs"][key], reference[key]) for key in expected]
        if "trained" in reply:
            every = sorted(reference[key] for key, one in expected.items() for _ in range(one.times))
            mine += zip(reply["trained"], every, strict=True)
        difference = max(abs(one - other) / max(1.0, abs(other)) for one, other in mine)
        if difference > tolerance:
            raise SystemExit(f"{arm}: log-probs differ by {difference:.1e} of their value")
        worst = max(worst, difference)
    return worst


def measure_in_turns(
    workers: dict[str, Worker], failures: dict[str, str], repeats: int
) -> dict[str, dict[str, list[dict]]]:
    """Timed rounds of every arm; the order turns round with every repeat. Arms that end here move to ``failures``."""
    timed = {arm: {"round": [], "prior": []} for arm in workers}
    for repeat in range(repeats):
        for arm in list(workers)[:: -1 if repeat % 2 else 1]:
            try:
                timed[arm]["round"].append(workers[arm].ask("round"))
                if arm.startswith("pipa"):
                    timed[arm]["prior"].append(workers[arm].ask("prior"))
            except WorkerFailed as error:
                failures[arm] = str(error)
                workers.pop(arm).close()
                del timed[arm]
    return timed


def ratios_of(results: dict[str, dict]) -> dict[tuple[str, str, bool], Ratio]:
    """Cost of every other arm / ours, by data, arm and whether it is a first pass."""
    ratios = {}
    for name, result in results.items():
        data = name.removesuffix("_checkpointing")
        for first in (False, True):
            ours, our_seconds = _cost(result, "pipa", first)
            for arm in result["timed"]:
                if arm != "pipa":
                    flops, seconds = _cost(result, arm, first)
                    each = [theirs / mine for theirs, mine in zip(seconds, our_seconds, strict=True)]
                    median = statistics.median(seconds) / statistics.median(our_seconds)
                    ratios[data, arm, first] = Ratio(flops / ours, median, min(each), max(each))
    return ratios


def _cost(result: dict, arm: str, first: bool) -> tuple[float, list[float]]:
    """FLOPs, and the seconds of every repeat, of a pass; a first pass of ours has the prior pass in it."""
    counted, timed = result["counted"][arm], result["timed"][arm]
    parts = [part for part in ("round", "prior") if part == "round" or (first and timed[part])]
    seconds = [sum(one["seconds"] for one in both) for both in zip(*(timed[part] for part in parts))]
    return sum(counted[part]["flops"] for part in parts), seconds
