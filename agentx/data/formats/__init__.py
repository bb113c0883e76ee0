"""Files to documents, and documents to trajectories.

Enters: text files and source trees; JSONL and JSON of texts or conversations, in the formats of
`FORMATS`, named or recognised by their first records. Leaves: documents one by one, in a fixed
order, and the `Trajectory` of each. Every record is kept, or skipped and counted with its reason:
`reading` has the loop that counts, `texts`, `native`, `chat` and `recorded` the formats, and
`registry` their names.
"""

from agentx.data.formats.native import Conversation, conversation_from_dict, conversation_to_dict
from agentx.data.formats.reading import OnError, ReadCounts, expand
from agentx.data.formats.registry import (
    FORMATS,
    conversation_trajectory,
    read_conversations,
    sniff,
    write_conversations,
)
from agentx.data.formats.texts import (
    TextDocument,
    read_text_jsonl,
    read_text_tree,
    text_trajectory,
)

__all__ = [
    "FORMATS",
    "Conversation",
    "OnError",
    "ReadCounts",
    "TextDocument",
    "conversation_from_dict",
    "conversation_to_dict",
    "conversation_trajectory",
    "expand",
    "read_conversations",
    "read_text_jsonl",
    "read_text_tree",
    "sniff",
    "text_trajectory",
    "write_conversations",
]
