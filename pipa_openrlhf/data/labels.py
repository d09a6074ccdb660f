"""Which records may be used: step labels present, right and wrong answers matched, the kept label."""

import random
from collections import defaultdict
from dataclasses import replace

from pipa_openrlhf.data.record import Record
from pipa_openrlhf.data.tokenise import Sample
from pipa_openrlhf.errors import UserError

KEEP = {"positive": (1,), "negative": (0,), "all": (0, 1)}


def check_step_labels(records: list[Record]) -> None:
    """Refuse ``--data.annotation step`` on data without step labels.

    Raises:
        UserError: names the first record that has none.
    """
    for record in records:
        if record.step_labels is None:
            raise UserError(
                f"{record.where}: --data.annotation step, but this answer has no step labels; "
                "add them (labels, or rejected_labels in pairs) or use --data.annotation answer"
            )


def match_pairs(samples: list[Sample], seed: int) -> list[Sample]:
    """Chosen, rejected, chosen, rejected, ...: only what has a partner, in the order of each pair's first member.

    Pairs that the data gave stay as they are. Single answers are matched at random within their problem; the result
    depends on ``seed`` and on the order of the samples, on nothing else.
    """
    given: dict[int, list[int]] = defaultdict(list)
    singles: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for index, sample in enumerate(samples):
        if sample.pair_id is None:
            singles[sample.problem_id][sample.answer_label].append(index)
        else:
            given[sample.pair_id].append(index)

    pairs = [(pair_id, sides) for pair_id, sides in given.items() if len(sides) == 2]
    next_id = max(given, default=-1) + 1
    for problem_id, (wrong, right) in singles.items():
        # Its own generator, seeded by text: another problem's answers do not change this one's matches.
        shuffled = random.Random(f"{seed} {problem_id}")
        shuffled.shuffle(right)
        shuffled.shuffle(wrong)
        for sides in zip(right, wrong, strict=False):
            pairs.append((next_id, list(sides)))
            next_id += 1
    pairs.sort(key=lambda pair: min(pair[1]))
    return [
        replace(samples[index], pair_id=pair_id)
        for pair_id, sides in pairs
        for index in sorted(sides, key=lambda index: -samples[index].answer_label)
    ]


def keep_labels(samples: list[Sample], keep: str) -> list[Sample]:
    """The samples whose answer is ``positive``, ``negative``, or ``all`` of them."""
    return [sample for sample in samples if sample.answer_label in KEEP[keep]]
