"""How spoken is what each role says in some talks? A turn is one text; what a classifier answers with is left out."""

from collections.abc import Iterable, Sequence

from toolkit.bases.spoken import Manner, manner_by_language, score_with_language
from toolkit.bases.spoken_features import LANGUAGES, Language
from toolkit.corpus.talk import Talk

N_SCORED = 500  # conversations of a sample that the spoken score looks at
ROLES = ("system", "user", "assistant", "text")
Scored = tuple[Language | None, float]


def manner_by_role(talks: Iterable[Talk], lang: str | None = None) -> dict[str, dict[str, Manner]]:
    """For each role that says something its manner, over `all` turns and those of each language.

    A turn's language is `lang`, else the talk's own where it is ko or en, else guessed from the script. Turns without
    a word, or in another script, are counted and not scored.
    Raises: InputError for a `lang` that is neither ko nor en. Cost: about 0.1 ms a sentence.
    """
    scored: dict[str, list[Scored]] = {}
    for talk in talks:
        of_talk = lang or (talk.lang if talk.lang in LANGUAGES else None)
        for turn in talk.turns:
            if talk.label is None or turn.role != "assistant":
                scored.setdefault(turn.role, []).extend(score_with_language([turn.content], of_talk))
    return {role: manner_by_language(scored[role]) for role in ROLES if role in scored}


def some_of(talks: Sequence[Talk], n: int) -> Iterable[Talk]:
    """At most n talks, spread evenly over all of them."""
    return (talks[at * len(talks) // n] for at in range(n)) if len(talks) > n else talks
