"""Files to documents, and documents to trajectories.

Enters: files, folders and globs, on this machine or in a bucket: texts and source trees; JSONL,
JSON and Parquet of texts or conversations, in the formats of `FORMATS`, named or recognised by
their first records. Leaves: documents one by one, in a fixed order, and the `Trajectory` of each.
Every record is kept, or skipped and counted with its reason.

In the order in which a file goes through: `places` finds and opens it, `reading` (JSON) and
`parquet` make records of it, `records` chooses between them and `reading` counts; `texts`,
`native`, `chat` and `recorded` are the formats, `registry` their names, and `documents` reads
whatever a path holds.
"""

from agentx.data.formats.documents import Document, identify, read_documents
from agentx.data.formats.native import Conversation, conversation_from_dict, conversation_to_dict
from agentx.data.formats.reading import OnError, ReadCounts
from agentx.data.formats.registry import (
    FORMATS,
    conversation_trajectory,
    sniff,
    write_conversations,
)
from agentx.data.formats.texts import TextDocument, text_trajectory

__all__ = [
    "FORMATS",
    "Conversation",
    "Document",
    "OnError",
    "ReadCounts",
    "TextDocument",
    "conversation_from_dict",
    "conversation_to_dict",
    "conversation_trajectory",
    "identify",
    "read_documents",
    "sniff",
    "text_trajectory",
    "write_conversations",
]
