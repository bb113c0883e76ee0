"""Curation: which documents are trained on, and which steps of them.

Enters: documents, as agentx.data.formats reads them, one by one. Leaves: the same documents, some
changed, without those that were taken, and counts of these by filter and reason. A filter is a
frozen dataclass, which configs bind, and a pure function of one document (`base`): of its form
(`quality`), its language (`language`), its calls and its reward (`runs`), its steps (`steps`), and
of what it shares with evaluation sets (`contamination`). Duplicates are a question about pairs of
documents (`duplicates`), asked in an order that any number of machines agree about.
"""

from agentx.data.curate.base import (
    Document,
    Filter,
    FilterCounts,
    Taken,
    TakenRow,
    run_filters,
    text_of,
    words,
)
from agentx.data.curate.contamination import Decontaminate, Hit, evaluation_notes
from agentx.data.curate.duplicates import (
    Deduplicate,
    Duplicate,
    DuplicateIndex,
    Pair,
    Signature,
)
from agentx.data.curate.language import Language
from agentx.data.curate.quality import Length, Repetition, Symbols
from agentx.data.curate.runs import MinReward, ValidCalls
from agentx.data.curate.steps import GoodSteps

__all__ = [
    "Decontaminate",
    "Deduplicate",
    "Document",
    "Duplicate",
    "DuplicateIndex",
    "Filter",
    "FilterCounts",
    "GoodSteps",
    "Hit",
    "Language",
    "Length",
    "MinReward",
    "Pair",
    "Repetition",
    "Signature",
    "Symbols",
    "Taken",
    "TakenRow",
    "ValidCalls",
    "evaluation_notes",
    "run_filters",
    "text_of",
    "words",
]
