"""Rows of what needs no statistics: the figures of a probe, and the compiled resources of the kernels."""

from collections.abc import Iterable, Iterator, Sequence

from bench.gate.decision import Rule, Word, compare
from bench.gate.processes import Layer
from bench.gate.protocol import Answer
from bench.gate.report import Row

# A change of 1 MiB counts, however small a share it is.
MEMORY = frozenset({"live_mib", "saved_mib"})
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
# More of any of these means a slower kernel, or one of which fewer fit on a multiprocessor.
RESOURCES = ("registers", "spill_bytes", "shared_bytes", "instructions")


def probed(case: str, base: Answer, head: Answer, rule: Rule, repeat: str) -> Iterator[Row]:
    """A row for each figure that both have."""
    for figure in base.figures.keys() & head.figures.keys():
        before, after = base.figures[figure], head.figures[figure]
        word = compare(before, after, rule, floor=1.0 if figure in MEMORY else 0.0)
        yield Row(name=case, metric=figure, word=word, fails=word == "SLOWER", base=before, head=after, repeat=repeat)


def compiled(base: Sequence[Layer], head: Sequence[Layer], rule: Rule, repeat: str) -> Iterator[Row]:
    """A row for each kernel, target and resource: the layer that changed most, the worse ones first.

    Layers are known by their problem (`1x512x512 64→64 bf16`), since a version may ship other launch settings for it.
    """
    before, after = _layers(base), _layers(head)
    for group in dict.fromkeys((kernel, target) for kernel, target, _ in before):
        name = " ".join(group)
        mine = [key for key in before if key[:2] == group]
        if missing := [key for key in mine if key not in after]:
            yield Row(
                name=name,
                metric="layers",
                word="MISSING",
                fails=True,
                reason=f"head lacks {len(missing)} of {len(mine)} layers, such as {missing[0][2]}",
                repeat=repeat,
            )
        shared = [key for key in mine if key in after]
        for resource in RESOURCES:
            yield _row(name, resource, [(key[2], before[key], after[key]) for key in shared], rule, repeat)


def _layers(rows: Iterable[Layer]) -> dict[tuple[str, str, str], Layer]:
    return {(str(row["kernel"]), str(row["target"]), str(row["config"]).partition(" | ")[0]): row for row in rows}


def _row(name: str, resource: str, layers: Sequence[tuple[str, Layer, Layer]], rule: Rule, repeat: str) -> Row:
    found: dict[Word, list[tuple[str, float, float]]] = {}
    for problem, before, after in layers:
        old, new = float(before[resource]), float(after[resource])
        found.setdefault(compare(old, new, rule), []).append((problem, old, new))
    word: Word = next((word for word in ("SLOWER", "FASTER") if word in found), "SAME")
    changed = found.get(word, [])
    if not changed:
        return Row(name=name, metric=resource, word="INCONCLUSIVE", reason="no layer in common", repeat=repeat)
    problem, old, new = max(changed, key=lambda layer: abs(layer[2] - layer[1]) / (layer[1] or 1.0))
    reason = "" if word == "SAME" else f"{len(changed)} of {len(layers)} layers; most in {problem}"
    return Row(
        name=name, metric=resource, word=word, fails=word == "SLOWER", reason=reason, base=old, head=new, repeat=repeat
    )
