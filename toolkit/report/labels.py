"""Classification: which label was taken for which."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from toolkit.report.made import confusion_table
from toolkit.report.markup import folded, section
from toolkit.report.seen import Seen
from toolkit.report.words import Say, shortened, within


def labels_section(seen: Seen) -> Markup:
    """The confusion matrix of the run, that of the base folded; nothing where texts are not labelled."""
    own, base = within(seen.after, "confusion"), within(seen.before, "confusion")
    says = Say("This run", "이 실행")
    of_base = Say("The base", "베이스")
    return section(
        "labels",
        Say("Which label was taken for which", "무엇을 무엇으로 분류했나"),
        _matrix(own, says),
        folded(of_base, _matrix(base, of_base)),
    )


def _matrix(found: Mapping[str, Any], says: Say) -> Markup:
    labels = [shortened(label, 60) for label in found.get("labels") or ()]
    return confusion_table(found.get("rows"), labels, labels, says)
