"""In which order techniques are applied, and which exclude each other."""

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import combinations

from .technique_optim import Technique


class OrderOptimizer:
    """Sorts techniques by what each has to come after; the caller's order decides the rest."""

    def order(self, techniques: Sequence[Technique]) -> list[Technique]:
        """The techniques, each behind those that it names in `after`.

        Raises:
            ValueError: if two exclude each other, as two of one role do, if one lacks what it `needs`, or if their
                orders contradict each other; the pair is named.
        """
        by_name = {technique.name: technique for technique in techniques}
        self._check(techniques, by_name)
        sorter = TopologicalSorter({name: set() for name in by_name})
        for name, technique in by_name.items():
            sorter.add(name, *(other for other in technique.after if other in by_name))
        places = {name: place for place, name in enumerate(by_name)}
        try:
            sorter.prepare()
        except CycleError as error:
            first, second = error.args[1][:2]
            raise ValueError(
                f"{first} and {second} each have to come after the other; leave one of them out."
            ) from None
        ordered, ready = [], []
        while sorter.is_active():
            ready = sorted((*ready, *sorter.get_ready()), key=places.get)
            ordered.append(by_name[ready[0]])
            sorter.done(ready.pop(0))
        return ordered

    def _check(self, techniques: Sequence[Technique], by_name: dict[str, Technique]) -> None:
        for first, second in combinations(techniques, 2):
            if first.name == second.name:
                raise ValueError(f"{first.name} is named twice; name it once.")
            reason = conflict(first, second)
            if reason:
                raise ValueError(
                    f"{first.name} and {second.name} exclude each other: {reason}; leave one of them out."
                )
        for technique in techniques:
            missing = [name for name in technique.needs if name not in by_name]
            if missing:
                raise ValueError(f"{technique.name} needs {missing[0]}; name both, or leave {technique.name} out.")


def conflict(first: Technique, second: Technique) -> str | None:
    """Why two techniques cannot run together, or `None`."""
    if first.role is not None and first.role == second.role:
        return f"both are the {first.role}"
    return first.excludes.get(second.name) or second.excludes.get(first.name)
