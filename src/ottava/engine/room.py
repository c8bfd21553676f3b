"""Whether a reply fits behind its question: said once, in the same words, wherever it is found out."""

from __future__ import annotations


def lacking(reply: int, context: int, question: int | None = None) -> tuple[str, str] | None:
    """(what is wrong, how to mend it) where a reply of so many ids does not fit behind a question of so many; or None.

    question: None where none is known yet: the shortest there could be has one id.
    """
    left = context - (1 if question is None else question)
    if reply <= left:
        return None
    behind = "any question" if question is None else f"a question of {question}"
    what = f"a reply of {reply} ids does not fit behind {behind}: the model's context holds {context}"
    if question is not None and left < 1:
        return what, "shorter questions (other levels), or a model with a longer context"
    return what, f"let replies have {left} ids or less" + (", by the question" if question is None else "")
