"""Questions about a picture of which some make sense only if others are answered yes.

Source: the Davidsonian scene graph (Cho et al. 2023), as DPG-Bench's evaluator uses it.
"""

from collections.abc import Mapping, Sequence


def apply(answers: Mapping[int, bool], parents: Mapping[int, Sequence[int]]) -> dict[int, bool]:
    """Answers with a no wherever one of a question's parents has a no, of its own or through its parents.

    It does not depend on the order of the questions.

    Args:
        parents: of each question; 0 stands for none.

    Raises:
        KeyError: a parent that has no answer.
    """
    left = dict(answers)
    changed = True
    while changed:
        failed = [q for q, above in parents.items() if left[q] and not all(left[p] for p in above if p)]
        changed = bool(failed)
        left.update((q, False) for q in failed)
    return left


def apply_in_order(answers: Mapping[int, bool], parents: Mapping[int, Sequence[int]]) -> dict[int, bool]:
    """The same in one pass in the order of `parents`, as the evaluator does it.

    A question that stands before its parent does not learn of what failed above that.
    """
    left = dict(answers)
    for question, above in parents.items():
        if not all(left[p] for p in above if p):
            left[question] = False
    return left
